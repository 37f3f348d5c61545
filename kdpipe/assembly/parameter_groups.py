"""What the optimizer gets: parameters, or groups of them with a weight decay and a learning rate of their own."""

from typing import Any

from torch import nn

from kdpipe.losses import Loss
from kdpipe.settings.components import NO_TIMM
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.schema import OptimizerSettings

Groups = list[dict[str, Any]]


def parameter_groups(settings: OptimizerSettings, model: nn.Module, loss: Loss) -> list[nn.Parameter] | Groups:
    """The parameters of the model and of the loss that can be trained; in groups where they are treated differently,
    whose learning rates have `lr_scale` as a factor, if any."""
    if settings.decay_norm_and_bias and settings.layer_decay is None:
        return [parameter for part in (model, loss) for parameter in part.parameters() if parameter.requires_grad]
    of_model = by_decay(settings, model) if settings.layer_decay is None else by_layer(settings, model)
    return [group for group in (*of_model, *by_decay(settings, loss)) if group["params"]]


def by_decay(settings: OptimizerSettings, module: nn.Module) -> Groups:
    """All weights with the optimizer's weight decay; norms and biases without one, if `settings` say so."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_small = parameter.ndim <= 1 or name.rpartition(".")[2] == "bias"
            (others if is_small and not settings.decay_norm_and_bias else decayed).append(parameter)
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]


def by_layer(settings: OptimizerSettings, model: nn.Module) -> Groups:
    """timm's groups of layers; the rate of each is `layer_decay` times that of the one after it, as in BEiT (Bao et
    al. 2022, https://arxiv.org/abs/2106.08254).

    Raises:
        ConfigError: timm is not installed, or the network does not say what its layers are.
    """
    try:
        from timm.optim import param_groups_layer_decay
    except ImportError as error:
        raise ConfigError("optimizer.layer_decay", settings.layer_decay, problem=NO_TIMM) from error
    network: Any = getattr(model, "network", model)
    if not hasattr(network, "group_matcher"):
        problem = f"{type(network).__name__} does not say what its layers are; networks of model=timm do"
        raise ConfigError("optimizer.layer_decay", settings.layer_decay, "null with this network", problem)
    assert settings.layer_decay is not None
    spared = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    groups = param_groups_layer_decay(
        network,
        weight_decay=settings.weight_decay,  # type: ignore[arg-type]  # it is passed on as it is
        no_weight_decay_list=() if settings.decay_norm_and_bias else spared,
        weight_decay_exclude_1d=not settings.decay_norm_and_bias,
        layer_decay=settings.layer_decay,
    )
    # Without a weight decay in the config, the optimizer's own holds.
    return [{key: value for key, value in group.items() if value is not None} for group in groups]
