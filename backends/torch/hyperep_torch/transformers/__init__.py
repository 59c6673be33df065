# SPDX-License-Identifier: Apache-2.0
"""Stock models of Hugging Face's transformers, trained with hyperep: ``pip install 'hyperep-torch[transformers]'``.

Two doors lead in. Importing this package registers both halves of the first with transformers.

* Inside transformers: ``DistributedConfig(..., ep_implementation="hyperep")`` in ``from_pretrained``; transformers
  shards and saves, and hyperep exchanges the tokens.
* Any model that is there: :func:`expert_parallelize`; or one that is read by each rank in its part:
  :func:`from_pretrained`.

In both the experts are computed by hyperep's grouped products, from the weights as transformers keeps them.
"""

from hyperep_torch.transformers.balance import global_balance_loss
from hyperep_torch.transformers.implementation import HyperepEP
from hyperep_torch.transformers.kernels import EXPERTS_IMPLEMENTATION
from hyperep_torch.transformers.loading import from_pretrained
from hyperep_torch.transformers.loads import LayerLoad, load_report
from hyperep_torch.transformers.parallelize import expert_parallelize
from hyperep_torch.transformers.saving import full_state_dict, save_pretrained

__all__ = [
    "EXPERTS_IMPLEMENTATION",
    "HyperepEP",
    "LayerLoad",
    "expert_parallelize",
    "from_pretrained",
    "full_state_dict",
    "global_balance_loss",
    "load_report",
    "save_pretrained",
]
