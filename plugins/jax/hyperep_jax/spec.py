# SPDX-License-Identifier: Apache-2.0
"""What this plugin says about itself; imports no JAX."""

from __future__ import annotations

from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.hookspecs import hookimpl
from hyperep.platform.spec import PlatformSpec, Viability

__all__ = ["CAPABILITIES", "hyperep_platform_spec", "probe"]

CAPABILITIES = {
    Capability.ALL_TO_ALL: Support.EMULATED,
    Capability.ALL_GATHER: Support.FULL,
    Capability.REDUCE_SCATTER: Support.EMULATED,
    Capability.ALL_REDUCE: Support.EMULATED,
    Capability.BROADCAST: Support.EMULATED,
    Capability.ASYNC_COLLECTIVES: Support.EMULATED,
    Capability.SUBGROUPS: Support.FULL,
    Capability.PERMUTE_ROWS: Support.FULL,
    Capability.GROUPED_MATMUL: Support.EMULATED,
    Capability.AUTODIFF: Support.FULL,
    Capability.MODULES: Support.EMULATED,
    Capability.SHARDED_PARAMETERS: Support.EMULATED,
    Capability.FLOAT64: Support.FULL,
    Capability.FLOAT16: Support.FULL,
    Capability.BFLOAT16: Support.FULL,
}


@hookimpl
def hyperep_platform_spec() -> PlatformSpec:
    """Describe the ``jax`` platform."""
    return PlatformSpec(
        name="jax",
        api=(2, 2),
        factory="hyperep_jax.platform:create",
        probe="hyperep_jax.spec:probe",
        description="JAX on CPU, an example of a platform on a functional framework",
        install_hint="pip install hyperep-jax",
        # An example: chosen by name, or where nothing else is installed.
        priority=-50,
        capabilities=CAPABILITIES,
        launcher="hyperep_jax.launcher:launcher",
        expected_failures={
            "CUSTOM-not-recorded": "a custom forward that reads, from outside, a tensor that is being differentiated "
            "raises UnexpectedTracerError; hand it in as an input",
        },
    )


def probe() -> Viability:
    """Say whether JAX is there."""
    try:
        import jax
    except ImportError as error:
        return Viability.no(f"jax cannot be imported: {error}")
    return Viability.yes("on CPU", framework=f"jax {jax.__version__}")
