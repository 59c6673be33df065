# SPDX-License-Identifier: Apache-2.0
"""No right layer is accused, whatever its style; and it was examined."""

import hand_written
import pytest
from right_layers import RIGHT

import hyperep
from hyperep.audit import Claims, PlatformSubject, check_layer
from hyperep.moe import MoE


@pytest.mark.parametrize("style", RIGHT)
def test_a_right_layer_is_not_accused(style):
    layer, claims = RIGHT[style]
    report = check_layer(hand_written.subject_of(layer, claims), (1, 2, 4), deadline=10.0)
    assert report.clean, [finding.headline for finding in report.findings]
    assert [line for line in report.examinations if line.outcome == "ok" and line.ranks == 4]


def make_own(platform, claims):
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    sizes = claims.sizes
    layer = MoE(platform, dim=sizes.dim, hidden_dim=sizes.hidden, num_experts=sizes.experts, top_k=sizes.top_k, seed=3)
    hyperep.ExpertParallel().apply(layer.children["experts"], mesh)
    return layer


def test_this_projects_own_layer_is_right():
    names = {"router": "router.gate", "w1": "experts.w1", "w2": "experts.w2", "w3": "experts.w3"}
    subject = PlatformSubject(make=make_own, names=names, claims=Claims(replicated="own"))
    report = check_layer(subject, (1, 2, 4))
    assert report.clean, [finding.headline for finding in report.findings]
    examined = {line.examination for line in report.examinations if line.outcome == "ok" and line.ranks == 2}
    assert {"one-row", "empty-rank", "empty-expert", "hot-expert", "interleaved", "two-layers"} <= examined
