"""BatchNorm where several processes train one network together."""

import logging

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

log = logging.getLogger("fivefold")


def with_norms_of_all(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with BatchNorm over the rows of all processes on GPUs; on CPUs, where torch has no such norm, as it is.

    Parameters, buffers and their names stay. The log says which it is, if the network has BatchNorm at all.
    """
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        return network
    if device.type != "cuda":
        log.info(
            "BatchNorm normalises by each process's own rows; its running statistics are averaged over the processes"
        )
        return network
    from timm.layers import convert_sync_batchnorm  # torch's own would drop the activations in timm's norms

    log.info("BatchNorm normalises by the rows of all processes (SyncBatchNorm)")
    return convert_sync_batchnorm(network)
