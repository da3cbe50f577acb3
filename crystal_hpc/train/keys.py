"""Under which keys a checkpoint keeps what: Megatron-core's names, in `torch_dist` files.

A layer's tensor is a slice of a stack of all layers' (`decoder.layers.x`, its first axis the layer), an optimizer's
state has a prefix of its own. Savers, readers and conversions all spell them by these functions.
"""

LAYERS = "decoder.layers."
STATE = "optimizer.state."
MAIN = "fp32_param"
"""The float32 copies of the weights, which a bfloat16 run trains."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def is_stack(key: str) -> bool:
    """Whether a key of the model stands for the tensors of all layers, rather than for one tensor."""
    return key.startswith(LAYERS) and not key.removeprefix(LAYERS).split(".")[0].isdigit()


def name_of(key: str, layer: int | None) -> str:
    """A tensor's name in the model: `decoder.layers.3.x` for layer 3 of the stack `decoder.layers.x`."""
    return key if layer is None else f"{LAYERS}{layer}.{key.removeprefix(LAYERS)}"


def key_of(name: str) -> tuple[str, int | None]:
    """The inverse of `name_of`: the key of a tensor, and its layer if the key is that of a stack."""
    number, _, rest = name.removeprefix(LAYERS).partition(".")
    return (LAYERS + rest, int(number)) if name.startswith(LAYERS) else (name, None)
