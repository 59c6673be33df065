# SPDX-License-Identifier: Apache-2.0
"""Audit hyperep's own layer: with PyTorch's tools around it, and as the core makes it on any platform.

hyperep audit run --subject hyperep_moe:torch_layer --world-size 1,2,4
hyperep audit run --subject hyperep_moe:loopback_layer --world-size 1,2,4
"""

import hyperep_torch as hep
import torch
import torch.distributed as dist
from hyperep_torch.audit import ModuleSubject
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import hyperep
from hyperep.audit import Claims, PlatformSubject
from hyperep.moe import MoE

NAMES = {"router": "router.gate", "w1": "experts.w1", "w2": "experts.w2", "w3": "experts.w3"}
SHARED = {f"shared_{name}": f"shared_experts.{name}.weight" for name in ("w1", "w2", "w3")}


def make(claims):
    """Experts over all ranks; the rest whole on each."""
    sizes = claims.sizes
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    layer = hep.MoE(sizes.dim, sizes.hidden, num_experts=sizes.experts, top_k=sizes.top_k, num_shared_experts=1)
    parallelize_module(layer, mesh, {"experts": hep.ExpertParallel()})
    hep.init_weights(layer, seed=0)
    return layer


def reduce(layer):
    """Sum what every rank holds, as a data-parallel wrapper would."""
    for name, parameter in layer.named_parameters():
        if not name.startswith("experts."):
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)


def norm(layer):
    """Of DTensors and tensors together."""
    return hep.clip_grad_norm_(layer.parameters(), 1e9)


def save(layer, optimizer, folder):
    """A distributed checkpoint."""
    model, state = get_state_dict(layer, optimizer)
    checkpoint.save({"model": model, "optimizer": state}, checkpoint_id=folder)


def load(layer, optimizer, folder):
    """The same, into a layer that is there."""
    model, state = get_state_dict(layer, optimizer)
    checkpoint.load({"model": model, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(layer, optimizer, model_state_dict=model, optim_state_dict=state)


torch_layer = ModuleSubject(
    name="hyperep's MoE on PyTorch",
    make=make,
    names=NAMES | SHARED,
    reduce=reduce,
    norm=norm,
    save=save,
    load=load,
    claims=Claims(shared=True),
)


def make_neutral(platform, claims):
    """The core's layer, on whichever platform this is."""
    sizes = claims.sizes
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    layer = MoE(platform, sizes.dim, sizes.hidden, num_experts=sizes.experts, top_k=sizes.top_k, seed=0)
    hyperep.ExpertParallel().apply(platform.named_modules(layer)["experts"], mesh)
    return layer


loopback_layer = PlatformSubject(
    name="hyperep's MoE on the loopback platform", make=make_neutral, names=NAMES, claims=Claims(replicated="own")
)
