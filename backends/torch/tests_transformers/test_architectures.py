# SPDX-License-Identifier: Apache-2.0
"""Stock models with their experts spread over ranks are the same models."""

import cases


def test_losses_and_gradients(ranks, architecture):
    ranks.run(cases.losses_and_gradients, architecture)
