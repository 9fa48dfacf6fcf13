"""The optimizers of a training run: AdamW, or Muon together with AdamW."""

import torch

from boltlm.training.config import TrainConfig


def build_optimizers(model: torch.nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or AdamW for embeddings, output matrix and norms, and Muon for the
    matrices of the transformer layers. Each parameter belongs to exactly one optimizer."""
    muon_parameters: list[torch.nn.Parameter] = []
    adamw_parameters: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_layer_matrix = ".layers." in name and parameter.ndim == 2
        if is_layer_matrix and config.optimizer == "muon":
            muon_parameters.append(parameter)
        else:
            adamw_parameters.append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            adamw_parameters,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
    ]
    if muon_parameters:
        optimizers.append(
            torch.optim.Muon(
                muon_parameters,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers
