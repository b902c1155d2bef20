"""The model as EleutherAI's lm-evaluation-harness takes it (lm_eval, extra `eval`).

`qwen-moe-jax lm-eval --model qwen_moe_jax --model_args path=PATH --tasks ...` registers it and hands
everything else to the harness, which has no hook to find models of other packages by itself. In Python:
`lm_eval.simple_evaluate(QwenMoeHarness(path), tasks=[...])`.
"""

from typing import Any

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ImportError:
    from qwen_moe_jax.errors import MissingExtraError

    raise MissingExtraError('lm_eval is not installed; `pip install "qwen-moe-jax[eval]"` has it.') from None

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.generation.api import QwenMoe
from qwen_moe_jax.generation.options import GenerationConfig
from qwen_moe_jax.generation.scores import rolling_windows
from qwen_moe_jax.parallel.mesh import make_mesh

# Of generation options that tasks name, those that this library knows by the same name.
_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("qwen_moe_jax")
class QwenMoeHarness(TemplateLM):
    """A checkpoint for the harness; every kind of request runs on the engine or the scorer."""

    def __init__(
        self,
        path: Any = None,
        *,
        pretrained: Any = None,
        dtype: str = "auto",
        data: int = 1,
        expert: int = 1,
        tensor: int = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        max_rows: int = 64,
        enable_thinking: bool | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **options: Any,
    ):
        """Loads the model.

        Args:
            path: of the checkpoint, or a `QwenMoe`; `pretrained` is another name for it.
            pretrained: see `path`.
            dtype: as of `QwenMoe.from_pretrained`.
            data, expert, tensor: sizes of the mesh.
            max_length: tokens of context and continuation; None for 2,048 or the model's context.
            max_gen_toks: tokens of a reply, where a task does not say.
            max_rows: replies that are generated together at most.
            enable_thinking: for the chat template.
            batch_size, max_batch_size, device: taken and not used: the engine fills what there is.
            **options: further arguments of `QwenMoe.from_pretrained`.

        Raises:
            InputError: no path, or a checkpoint without tokenizer.
        """
        super().__init__()
        source = path if path is not None else pretrained
        if source is None:
            raise InputError("the harness was given no model; give --model_args path=PATH.")
        if isinstance(source, QwenMoe):
            self.model = source
        else:
            mesh = make_mesh(data, expert, tensor) if data * expert * tensor > 1 else None
            self.model = QwenMoe.from_pretrained(str(source), dtype=dtype, mesh=mesh, **options)
        if self.model.tokenizer is None:
            raise InputError(f"{source} has no tokenizer.json, and the harness speaks in texts.")
        longest = self.model.config.max_position_embeddings
        self.max_length = min(2048, longest) if max_length is None else int(max_length)
        self.max_gen_toks = int(max_gen_toks)
        self._max_rows = int(max_rows)
        self._enable_thinking = enable_thinking
        self._tokens = self.model.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        found = self.model.end_ids
        if not found:
            raise InputError("the checkpoint names no end-of-text token.")
        return found[0]

    @property
    def tokenizer_name(self) -> str:
        """Of the folder, for the harness's cache of requests."""
        return str(self.model.folder).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; Qwen's tokenizer adds none of its own."""
        return list(self._tokens.encode(string))

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        ids = [tokens] if isinstance(tokens, int) else list(tokens)
        return self._tokens.decode(ids, skip_special_tokens=skip_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The checkpoint's own template, as text."""
        template = self.model.chat_template
        if not chat_template or template is None:
            return None
        return template.source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the prompt's text; without a generation prompt its last message is left open."""
        if self.model.chat_template is None:
            raise InputError("the checkpoint has no chat template.")
        return self.model.chat_template.render(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            enable_thinking=self._enable_thinking,
        )

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of continuations; contexts are cut from the left where "
        "too long."""
        contexts = []
        for _, context, text in requests:
            room = self.max_length + 1 - len(text)
            contexts.append(context[-room:] if room > 0 else context[-1:])
        texts = [text[-self.max_length :] for _, _, text in requests]
        scores = self.model.score(contexts, texts) if requests else []
        answers = [(score.logprob, score.is_greedy) for score in scores]
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of `max_length`."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            found = rolling_windows(tokens, self.prefix_token_id, self.max_length) if tokens else []
            windows += [(None, context, text) for context, text in found]
            owners += [number] * len(found)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Replies, all of them through one engine; a prompt that is too long is cut from the left."""
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        prompts, options, stops = [], [], []
        for request in requests:
            arguments: Any = request.args
            context, given = arguments
            asked: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            until = handle_stop_sequences(asked.get("until"), eos=eos)
            count = int(asked["max_gen_toks"])
            room = self.max_length - count
            if room < 1:
                raise InputError(
                    f"a task asks for {count} tokens, and max_length is {self.max_length}; give a larger one."
                )
            prompts.append(self.tok_encode(context)[-room:])
            options.append(self._options(asked, until, eos, count))
            stops.append(until)
        replies = [""] * len(requests)
        with self.model.engine(max_rows=self._max_rows) as engine:
            for number, out in engine.run(prompts, options, progress=not disable_tqdm):
                assert out.texts is not None
                replies[number] = postprocess_generated_text(
                    generation=out.texts[0], stop=stops[number], think_end_token=None
                )
        for request, reply in zip(requests, replies, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, reply)
        return replies

    def _options(self, asked: Any, until: list[str], eos: str, count: int) -> dict[str, Any]:
        """A task's generation options as fields of `GenerationConfig`."""
        texts = [text for text in until if text and text != eos]
        found: dict[str, Any] = {"max_new_tokens": count, "stop_strings": texts or None}
        found["do_sample"] = bool(asked.get("do_sample"))
        if found["do_sample"]:
            # what the harness's own models do where a task does not say
            found |= {"top_k": 50, "top_p": 1.0}
            found |= {name: asked[name] for name in _OPTIONS if asked.get(name) is not None}
        GenerationConfig(**found)  # says at once what cannot be
        return found
