"""Which parameters weight decay shrinks: all but biases and those of WITHOUT_DECAY.

Decay pulls to zero, which says "no effect" of a weight that something is multiplied by and then summed. It is not so of

biases                      they shift, and no number of them makes a model more complex
scales of a normalisation   start at 1, where they change nothing; at 0 nothing passes
STAR's factors              W_t in W_t ∘ W_shared: the same. The shared weights are decayed
gates of mutual units       at 0 the gate stands half open, whatever the row

Gates at which 0 is neutral are decayed: those over experts, a softmax, whose 0 is the plain mean, and PEPNet's, whose
0 is 2 sigmoid(0) = 1.
"""

from collections.abc import Mapping

from torch import nn

from saml_kernels.layers import STARMLP, MultiBranchMLP, MutualUnit, PartitionedNorm

BIASES = ("bias", "biases")
"""How the name of a bias ends in every layer: ``bias``, ``gate_bias``, ``shared_biases``."""

WITHOUT_DECAY: dict[type[nn.Module], tuple[str, ...]] = {
    PartitionedNorm: ("weight", "shared_weight"),
    STARMLP: ("weights",),
    MultiBranchMLP: ("gate_weights",),
    MutualUnit: ("gate_weight",),
}
"""By the layer that holds them, the names there of parameters, or of their lists, besides biases."""


def without_decay(model: nn.Module) -> list[str]:
    """Names of the parameters of a model that weight decay leaves alone, as ``named_parameters`` has them."""
    layers = dict(model.named_modules())
    return [name for name, _ in model.named_parameters() if _is_exempt(layers, name)]


def owner_of(layers: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    """The layer that holds a parameter, and the name there of it or of the list that it is in.

    Args:
        layers: by name, as ``named_modules`` has them.
        name: of the parameter, as ``named_parameters`` has it.
    """
    owner, _, own = name.rpartition(".")
    if isinstance(layers[owner], nn.ParameterList | nn.ParameterDict):
        # Layers hold their lists; what is in a list has a number for a name.
        owner, _, own = owner.rpartition(".")
    return layers[owner], own


def _is_exempt(layers: Mapping[str, nn.Module], name: str) -> bool:
    layer, own = owner_of(layers, name)
    return own.endswith(BIASES) or own in WITHOUT_DECAY.get(type(layer), ())
