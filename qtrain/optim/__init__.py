"""Optimizers whose moments are stored in few bits, parameter groups and learning-rate schedules.

states = AdamStateRecipe(exp_avg="dynamic8", exp_avg_sq="dynamic8")
optimizer = AdamW(parameter_groups(model, weight_decay=0.1), lr=3e-3, betas=(0.9, 0.95), states=states)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, CosineSchedule(warmup_steps=100, total_steps=2000))
"""

from .adamw import AdamW
from .bnb import BnbAdamW, BnbLion
from .groups import parameter_groups
from .schedules import ConstantSchedule, CosineSchedule, WSDSchedule
from .sharding import check_shardable
from .states import AdamStateRecipe
from .torch_adamw import TorchAdamW

__all__ = [
    "AdamStateRecipe",
    "AdamW",
    "BnbAdamW",
    "BnbLion",
    "ConstantSchedule",
    "CosineSchedule",
    "TorchAdamW",
    "WSDSchedule",
    "check_shardable",
    "parameter_groups",
]
