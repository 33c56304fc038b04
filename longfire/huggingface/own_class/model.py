"""LongfireForCausalLM: longfire's model with the interface of transformers, for `generate`,
`Trainer`, PEFT and lm-eval."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from longfire.huggingface.own_class.cache import GenerationCache
from longfire.huggingface.own_class.config import LongfireConfig
from longfire.huggingface.own_class.padding import is_padded_on_the_right, left_padding, sequence_of
from longfire.initialise import build, initialise
from longfire.mixers.mixer import Sequence
from longfire.model import Block, Model
from longfire.ops.choice import choose_where_nobody_has


class CheckpointedModel(Model):
    """longfire's model, whose blocks are recomputed in the backward where transformers asks for
    it.

    transformers sets both attributes below (`gradient_checkpointing_enable`).
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor] | None = None

    def run_block(
        self,
        block: Block,
        x_BTD: Tensor,
        seq: Sequence,
    ) -> Tensor:
        if self.gradient_checkpointing and self.training and seq.cache is None:
            assert self._gradient_checkpointing_func is not None, "set with gradient_checkpointing"
            return self._gradient_checkpointing_func(block, x_BTD, seq)
        return block(x_BTD, seq)


class LongfireForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder of any mixers (longfire.model.Model) as a causal language model of transformers.

    Padding of an attention_mask may be on the left or on the right; `generate` needs it on the
    left. position_ids that begin anew separate packed documents. Activations have the type of the
    embedding, or that of torch's autocast. In training, dropout is drawn from torch's generator.
    """

    config_class = LongfireConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"model.head.weight": "model.embed.weight"}
    _is_stateful = True  # a state cannot forget tokens, as assisted generation asks

    def __init__(self, config: LongfireConfig) -> None:
        super().__init__(config)
        self.model = CheckpointedModel(config.model_shape())
        self._keep_in_fp32_modules_strict = kept_in_fp32(self.model)
        # The same for transformers 5.0.
        self.dtype_plan = dict.fromkeys(kept_in_fp32(self.model), torch.float32)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GenerationCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """ids (B, T) -> logits (B, T, V) in fp32, and the loss of the labels.

        labels: the ids themselves, -100 where there is none; they are shifted here, as everywhere
        in transformers. logits_to_keep: of how many last tokens there are logits, or of which.
        kwargs: for the loss (num_items_in_batch). Raises ValueError for what the model cannot do.
        """
        if input_ids is None:
            raise ValueError(
                "LongfireForCausalLM takes input_ids; it has no path for inputs_embeds"
            )
        if output_attentions:
            raise ValueError(
                "output_attentions: longfire's attention never makes its weights; leave it out"
            )
        cache = self.cache_for(past_key_values, use_cache, attention_mask)
        seq = sequence_of(input_ids, attention_mask, position_ids, cache)
        self.check_positions(seq)
        if self.training and self.model.config.drops:
            seq.noise_BT = torch.randint_like(input_ids, -(2**31), 2**31, dtype=torch.int64).int()
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        chosen = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        with recorded(self.model if output_hidden_states else None) as states:
            hidden_BTD, logits_BTV = self.computed(input_ids, seq, chosen)
        if cache is not None:
            self.count(cache, input_ids, attention_mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BTV, labels, vocab_size=logits_BTV.shape[-1], **kwargs)
        out = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=cache,
            hidden_states=(*states, hidden_BTD) if output_hidden_states else None,
        )
        if return_dict is False:
            return out.to_tuple()
        return out

    def computed(
        self,
        ids_BT: Tensor,
        seq: Sequence,
        chosen: slice | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states after the last norm, and the logits of the chosen tokens.

        Activations have the type that torch's autocast asks for, else the embedding's.
        """
        device = self.model.embed.weight.device
        choose_where_nobody_has(device)
        autocasts = torch.is_autocast_enabled(device.type)
        dtype = self.model.embed.weight.dtype
        if autocasts:
            dtype = torch.get_autocast_dtype(device.type)
        self.model.compute_in(dtype)
        with torch.autocast(device.type, enabled=False):  # longfire's layers cast by themselves
            hidden_BTD = self.model(ids_BT, seq)
            return hidden_BTD, self.model.logits(hidden_BTD[:, chosen])

    def cache_for(
        self,
        given: GenerationCache | None,
        use_cache: bool | None,
        mask_BS: Tensor | None,
    ) -> GenerationCache | None:
        """The cache of this call. Raises ValueError for another class's, and where the next token
        would follow padding."""
        if given is not None and not isinstance(given, GenerationCache):
            raise ValueError(
                f"past_key_values is a {type(given).__name__}; LongfireForCausalLM continues what "
                "it returned itself (GenerationCache): leave it out in the first call"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
            use_cache = use_cache and not is_padded_on_the_right(mask_BS)
        if given is None and not use_cache:
            return None
        if is_padded_on_the_right(mask_BS):
            raise ValueError(
                "attention_mask has padding on the right, and what is generated would follow it: "
                "pad on the left (tokenizer.padding_side = 'left'), or set use_cache = False where "
                "nothing is generated"
            )
        if given is None:
            return GenerationCache()
        return given

    def count(
        self,
        cache: GenerationCache,
        ids_BT: Tensor,
        mask_BS: Tensor | None,
    ) -> None:
        """Count the tokens that the cache has seen. Padding is taken once, from the mask of the
        first call."""
        if not cache.seen:
            cache.kept.padding_B = left_padding(mask_BS)
        cache.seen += ids_BT.shape[1]

    def check_positions(self, seq: Sequence) -> None:
        """Raises ValueError beyond the learned positions, which an embedding could not look up."""
        if not self.model.config.learned_positions:
            return
        longest = int(seq.positions_BT.max()) + 1
        limit = self.model.config.max_position_embeddings
        if longest > limit:
            raise ValueError(
                f"{longest} tokens, but the model has learned {limit} positions: shorten the text"
            )

    def prepare_inputs_for_generation(  # type: ignore[override]  # only the keys that it reads
        self,
        input_ids: Tensor,
        past_key_values: GenerationCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: object,
    ) -> dict[str, object]:
        """The arguments of forward for the next token: only the ids after those that the cache has
        seen."""
        seen = 0 if past_key_values is None else past_key_values.seen
        only_new = attention_mask is not None and attention_mask.shape[1] > input_ids.shape[1]
        return {
            "input_ids": input_ids if only_new else input_ids[:, seen:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "output_hidden_states": kwargs.get("output_hidden_states"),
            "output_attentions": kwargs.get("output_attentions"),
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The first forward makes the cache."""
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        """Parameters that no file had begin as in longfire, under torch's seed; so do rows that a
        resize adds.

        transformers calls this for one module after the other; the first call fills them all.
        """
        if not any(module is ours for ours in self.modules()):  # the new rows of a resize
            weight = module.weight
            assert isinstance(weight, Tensor), "an embedding or a head"
            weight.data.normal_(0.0, self.config.initializer_range)
            return
        fresh = {}
        for name, parameter in self.model.named_parameters():
            if not getattr(parameter, "_is_hf_initialized", False):
                fresh[name] = parameter
        if not fresh:
            return
        seed = int(torch.randint(2**31, (), device="cpu"))
        if len(fresh) == len(dict(self.model.named_parameters())):
            initialise(self.model, seed)
        else:
            initial = build(self.model.config, seed).state_dict()
            for name, parameter in fresh.items():
                parameter.data.copy_(initial[name])
        for parameter in fresh.values():
            parameter._is_hf_initialized = True


def kept_in_fp32(model: Model) -> set[str]:
    """Patterns of the parameters that no type may round (`keep_fp32` of their mixers)."""
    patterns = set()
    for name, module in model.named_modules():
        for leaf in getattr(module, "keep_fp32", ()):
            patterns.add(rf"{name.rpartition('.')[2]}\.{leaf}$")
    return patterns


@contextmanager
def recorded(model: Model | None) -> Iterator[list[Tensor]]:
    """Within the context, the input of each block is appended to the list; none without a model."""
    states: list[Tensor] = []

    def record(block: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        states.append(arguments[0])

    blocks = model.layers if model is not None else ()
    hooks = [block.register_forward_pre_hook(record) for block in blocks]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


AutoModelForCausalLM.register(LongfireConfig, LongfireForCausalLM, exist_ok=True)
