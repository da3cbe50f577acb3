"""The shape of a CrystalCoder model, under the names of its published config.json."""

from typing import Any

from transformers import PretrainedConfig


class CrystalCoderConfig(PretrainedConfig):  # type: ignore[misc]
    """A GPT-2-like decoder with rotary positions, SwiGLU and muP. The defaults are Crystal-7B's, but without muP.

    `n_inner`: width of each of the two SwiGLU input matrices; None: four times `n_embd`. `rotary_dim`: how many
    dimensions of each head are rotated. `mup_embeddings_scale`: factor on the embedded tokens. Logits are multiplied by
    `mup_output_alpha` times `mup_width_scale`. `mup_scale_qk_dot_by_d`: attention scores are divided by the head width,
    not by its square root.
    `initializer_range`: standard deviation of an initial embedding, and of a matrix at muP's base width.
    """

    model_type = "crystalcoder"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __init__(
        self,
        vocab_size: int = 32032,
        n_positions: int = 2048,
        n_embd: int = 4096,
        n_layer: int = 32,
        n_head: int = 32,
        n_inner: int | None = None,
        rotary_dim: int = 32,
        activation_function: str = "swiglu",
        position_embedding_type: str = "rotary",
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.073,
        mup_embeddings_scale: float = 1.0,
        mup_output_alpha: float = 1.0,
        mup_width_scale: float = 1.0,
        mup_scale_qk_dot_by_d: bool = False,
        use_cache: bool = True,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = True,
        **others: Any,
    ) -> None:
        if (activation_function, position_embedding_type, tie_word_embeddings) != ("swiglu", "rotary", True):
            raise ValueError("this code runs only swiglu, rotary models with tied word embeddings")
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_inner = 4 * n_embd if n_inner is None else n_inner
        self.rotary_dim = rotary_dim
        self.activation_function = activation_function
        self.position_embedding_type = position_embedding_type
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.mup_embeddings_scale = mup_embeddings_scale
        self.mup_output_alpha = mup_output_alpha
        self.mup_width_scale = mup_width_scale
        self.mup_scale_qk_dot_by_d = mup_scale_qk_dot_by_d
        self.use_cache = use_cache
        super().__init__(
            bos_token_id=bos_token_id, eos_token_id=eos_token_id, tie_word_embeddings=tie_word_embeddings, **others
        )
