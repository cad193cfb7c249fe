"""Tiny random models of every family, a tiny tokenizer, and what every test shares. Nothing here needs a network."""

from __future__ import annotations

import copy
import gc
import inspect
import os

# One process for each core, or one for all of them; and so in the processes that tests start: threads that wait for
# work would take the cores from those that have some.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else os.environ.get("OMP_NUM_THREADS", "2")

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYPRUNE_CACHE"] = os.path.devnull  # no folder: what was tuned on this machine changes no test
if not torch.cuda.is_available():
    # Triton reads this when it is first imported, whoever imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Files whose tests take long, first: at the end one process would wait for another.
LONG = ("test_triton_experts", "test_real_model", "test_gpu_command", "test_cuda_simulated", "test_cli_failures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    # What is here now stays: no collection of garbage needs to look at it again, and these are millions of objects.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


LAYERS, HIDDEN, WIDTH, VOCABULARY = 3, 32, 96, 128

_COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_inner": WIDTH,
    "n_positions": 64,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MODERN = {**_COMMON, "intermediate_size": WIDTH, "num_key_value_heads": 2, "head_dim": 8}

# model type -> config of a tiny model; grouped-query attention wherever the family has it.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "gpt_neo": {
        "hidden_size": HIDDEN,
        "num_layers": LAYERS,
        "num_heads": 4,
        "intermediate_size": WIDTH,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 8,
        "max_position_embeddings": 64,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_neox": {**_COMMON, "intermediate_size": WIDTH},
    "gpt_bigcode": _GPT,
    "opt": {**_COMMON, "ffn_dim": WIDTH, "word_embed_proj_dim": HIDDEN},
    "falcon": {**_COMMON, "ffn_hidden_size": WIDTH, "bias": True},
    "phi": {**_COMMON, "intermediate_size": WIDTH},
    "phi3": _MODERN,
    "llama": _MODERN,
    "mistral": _MODERN,
    "qwen2": _MODERN,
    "qwen3": _MODERN,
    "gemma": _MODERN,
    "gemma2": {**_MODERN, "sliding_window": 16},
    "gemma3_text": {**_MODERN, "sliding_window": 16},
    "olmo2": _MODERN,
    "smollm3": _MODERN,
    "starcoder2": _MODERN,
    "glm4": _MODERN,
    "stablelm": _MODERN,
    "nemotron": _MODERN,
    "granite": _MODERN,
    "cohere2": _MODERN,
    # beyond the 24: in-layer projections without a module, biased gated, w1/w3/w2
    "biogpt": {**_COMMON, "intermediate_size": WIDTH},
    "xglm": {
        "d_model": HIDDEN,
        "num_layers": LAYERS,
        "attention_heads": 4,
        "ffn_dim": WIDTH,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    },
    # no width in the config: 4 x hidden, which is WIDTH here
    "openai-gpt": {"n_embd": WIDTH // 4, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY},
    "lfm2": {**_MODERN, "block_auto_adjust_ff_dim": False, "layer_types": ["full_attention", "conv", "full_attention"]},
}


def make_config(family: str, **changes: Any) -> Any:
    """The tiny config of a family, with changes."""
    return AutoConfig.for_model(family, **{**FAMILIES[family], **changes})


def make_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model of a family, in eval mode, with weights large enough that every neuron counts."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(family, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 or name.endswith("bias"):
                parameter.normal_(std=0.15)
    return model


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """`tiny(family, seed=0, **config_changes)` -> a fresh tiny model."""
    return make_model


@pytest.fixture
def tiny_config() -> Callable[..., Any]:
    return make_config


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Every family in turn."""
    return str(request.param)


@pytest.fixture
def ids() -> torch.Tensor:
    """`[4, 16]` random token ids."""
    return torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def more_ids() -> torch.Tensor:
    """`[8, 16]` random token ids: enough to fit every neuron of a tiny model."""
    return torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def random_mask() -> Callable[..., Any]:
    """`random_mask(model, widths, seed=0)` -> a mask that keeps `widths[i]` random neurons of layer i."""
    from pyprune import KeepIndex, Mask
    from pyprune.model import families

    def make(model: Any, widths: Sequence[int], seed: int = 0) -> Mask:
        ffns = families.find_ffns(model)
        generator = torch.Generator().manual_seed(seed)
        sizes = [ffn.intermediate_size for ffn in ffns]
        keeps = [
            KeepIndex(torch.randperm(size, generator=generator)[:width].sort().values, size)
            for size, width in zip(sizes, widths, strict=True)
        ]
        return Mask(tuple(keeps), families.fingerprint(model, ffns))

    return make


@pytest.fixture
def masked() -> Callable[..., Any]:
    """`masked(model, mask)` -> a copy of the dense model in which the removed neurons reach nothing."""
    from pyprune.model import families

    @torch.no_grad()
    def make(model: Any, mask: Any) -> Any:
        model = copy.deepcopy(model)
        for ffn, keep in zip(families.find_ffns(model), mask.layers, strict=True):
            removed = torch.ones(keep.intermediate_size, dtype=torch.bool)
            removed[keep.neurons.long()] = False
            ffn.weights().down[removed] = 0.0
        return model

    return make


@pytest.fixture
def same_logits() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """`same_logits(got, want)`: float32 logits of a tiny model are those of the same function, summed in another order.

    Up to a logit, some 700 products are added up: in each of 3 layers F of the FFN and about 4 D of attention and the
    inputs of the FFN, and D of the head. Each may be off by 2**-24 of the largest partial sum, and how many are depends
    on the CPU. One live neuron too many or too few changes the logits by 1e-3 of the largest, and more.
    """
    bound = (LAYERS * (WIDTH + 4 * HIDDEN) + HIDDEN) * 2.0**-24

    def check(got: torch.Tensor, want: torch.Tensor) -> None:
        torch.testing.assert_close(got, want, rtol=bound, atol=bound * float(want.abs().max()))

    return check


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 1024 tokens, trained here."""
    from pyprune.base.text import default_text

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([default_text()[:200_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a tiny dense LLaMA of 1024 tokens, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_model("llama", vocab_size=1024, max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        from pyprune.ffn import native

        names = ["none"] if native.load() else torch.ops.pyprune.cpu_isas().split(",")
        metafunc.parametrize("isa", names, indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn, in use by the native library."""
    yield torch.ops.pyprune.cpu_isa(request.param)
    torch.ops.pyprune.cpu_isa("best")


@pytest.fixture(autouse=True)
def _compile_anew(request):
    """Tests that compile start without what others compiled: a function may be compiled a limited number of times."""
    if "torch.compile" in inspect.getsource(request.function):
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def short_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model writes itself is in many short documents: steps of decoding are what takes time."""
    monkeypatch.setattr("pyprune.pruning.written.LENGTH", 32)
    monkeypatch.setattr("pyprune.pruning.written.AT_ONCE", 256)
