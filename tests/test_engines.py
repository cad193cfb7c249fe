"""Exports and plugin in the engines themselves; `make engines` sets these up and runs this."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_cases import write_dense
from moe_cases import make_mixture

from pyprune import prune, prune_experts
from pyprune.base.errors import CheckpointError
from pyprune.model import checkpoint
from pyprune.serving import gguf_check, gguf_plan
from pyprune.serving.deci import to_deci
from pyprune.serving.gguf_export import to_gguf
from pyprune.serving.padded import to_padded

pytestmark = pytest.mark.engine
DIFFERING = (64, 90, 32)

# Of a size that vLLM's attention has on a CPU.
SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}


def pruned(tiny: Callable[..., Any], random_mask: Callable[..., Any], family: str, **changes: Any) -> Any:
    model = tiny(family, **changes)
    prune(model, mask=random_mask(model, DIFFERING), repair=None)
    return model


@pytest.fixture
def ask_vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    return importlib.import_module("bench.engines.places").ask_vllm


def asked(ids: torch.Tensor) -> dict[str, Any]:
    rows = ids.tolist()
    return {"context": 64, "prompts": rows, "new_tokens": 8, "windows": rows}


@torch.no_grad()
def check_same(found: dict[str, Any], model: Any, ids: torch.Tensor, rounded: bool = False) -> None:
    """vLLM's answer is what the model gives: in tokens, unless weights were rounded, and in nats."""
    nll = -model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    assert found["nll"] == pytest.approx(float(nll), rel=1e-2 if rounded else 1e-4)
    if not rounded:
        generated = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert found["generated"] == generated[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2", "gemma"])
def test_llama_cpp_gives_the_logits_of_the_checkpoint(
    family: str, kind: str, tiny: Callable[..., Any], random_mask: Callable[..., Any], ids: torch.Tensor, tmp_path: Path
) -> None:
    assert gguf_check.has_llama_cpp(), "make engines has not built llama-cpp-python's library"
    base = write_dense(tiny(family), tmp_path / "dense.gguf")
    model = pruned(tiny, random_mask, family)
    written = to_gguf(model, base, tmp_path / "out.gguf", kind, "padded", tokens=ids)
    print(family, kind, written.arch, written.check)
    if kind == "f32":
        assert written.check["divergence"] < 1e-5 and written.check["agree"] == 1.0


def test_llama_cpp_tells_a_wrong_file(
    tiny: Callable[..., Any],
    random_mask: Callable[..., Any],
    ids: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = write_dense(tiny("qwen2"), tmp_path / "dense.gguf")
    monkeypatch.setitem(gguf_plan.AS_DECI, "qwen2", False)  # heads stay in the order of another architecture
    with pytest.raises(CheckpointError, match=r"llama.cpp's next tokens diverge by"):
        to_gguf(pruned(tiny, random_mask, "qwen2"), base, tmp_path / "out.gguf", "f32", tokens=ids)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("family", "target", "kind"),
    [
        ("llama", None, "models.llama.LlamaForCausalLM"),
        ("llama", "deci", "models.nemotron_nas.DeciLMForCausalLM"),
        ("llama", "padded", "models.llama.LlamaForCausalLM"),
        ("llama", "transformers", "models.transformers.TransformersForCausalLM"),
        ("qwen2", None, "models.qwen2.Qwen2ForCausalLM"),
        ("qwen2", "deci", "models.nemotron_nas.DeciLMForCausalLM"),
        ("qwen3", None, "models.qwen3.Qwen3ForCausalLM"),
        ("mistral", None, "models.mistral.MistralForCausalLM"),
        ("gemma3_text", None, "models.gemma3.Gemma3ForCausalLM"),
        ("phi3", None, "models.phi3.Phi3ForCausalLM"),
        ("gpt2", None, "models.gpt2.GPT2LMHeadModel"),
        ("opt", None, "models.opt.OPTForCausalLM"),
    ],
)
def test_vllm_writes_the_tokens_of_the_checkpoint(
    family: str,
    target: str | None,
    kind: str,
    tiny: Callable[..., Any],
    random_mask: Callable[..., Any],
    ids: torch.Tensor,
    tmp_path: Path,
    ask_vllm: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    sizes = {"gpt2": {"n_embd": 128, "n_head": 2}, "opt": {"hidden_size": 128, "num_attention_heads": 2}}
    model = pruned(tiny, random_mask, family, **sizes.get(family, SIZES))
    folder = checkpoint.save(model, tmp_path / "pruned")
    if target == "deci":
        folder = Path(to_deci(model, tmp_path / "out").path)
    elif target == "padded":
        folder = Path(to_padded(model, tmp_path / "out", ids).path)
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "trust_remote_code": target == "deci",
        "model_impl": "transformers" if target == "transformers" else "auto",
    }
    found = ask_vllm({"model": str(folder), "options": options, **asked(ids)})
    assert found["class"].endswith(kind)
    check_same(found, model, ids)


@pytest.mark.parametrize("widths", [DIFFERING, (64, 90, 33), (64, 91, 32)])
def test_vllm_divides_layers_among_two_processes(
    widths: tuple[int, ...],
    tiny: Callable[..., Any],
    random_mask: Callable[..., Any],
    ids: torch.Tensor,
    tmp_path: Path,
    ask_vllm: Callable[..., dict[str, Any]],
) -> None:
    """Tensor parallelism of 2, each process on a core of its own: widths that it divides run, another is refused."""
    model = tiny("llama", **SIZES)
    prune(model, mask=random_mask(model, widths), repair=None)
    folder = str(checkpoint.save(model, tmp_path / "pruned"))
    options = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "tensor_parallel_size": 2}
    request = {"model": folder, "options": options, **asked(ids)}
    if widths == DIFFERING:
        check_same(ask_vllm(request, VLLM_CPU_OMP_THREADS_BIND="0|1"), model, ids)
    else:
        with pytest.raises(RuntimeError, match=r"mlp.gate_up_proj has .(33, 33|91, 91). neurons, which tensor para"):
            ask_vllm(request, VLLM_CPU_OMP_THREADS_BIND="0|1")


@pytest.mark.parametrize(
    ("kind", "width", "own"),
    [
        ("qwen3_moe", 40, "models.qwen3_moe.Qwen3MoeForCausalLM"),
        ("mixtral", 32, "models.mixtral.MixtralForCausalLM"),
    ],
)
def test_vllm_writes_the_tokens_of_pruned_experts(
    kind: str,
    width: int,
    own: str,
    ids: torch.Tensor,
    tmp_path: Path,
    ask_vllm: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Fewer neurons in each expert, and fewer experts, as the config's own keys say."""
    model = make_mixture(kind, **SIZES)
    prune(model, width / 48, "magnitude-l2-both", allocation="uniform:multiple=8", repair=None)
    prune_experts(model, 0.75, "random")
    assert tuple(model.model.layers[0].mlp.experts.down_proj.shape) == (3, 128, width)
    folder = str(checkpoint.save(model, tmp_path / "pruned"))
    options = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
    found = ask_vllm({"model": folder, "options": options, **asked(ids)})
    assert found["class"].endswith(own)
    check_same(found, model, ids)


@pytest.mark.parametrize(
    ("family", "ours", "eager", "records"),
    [
        ("llama", {"kernels": "on"}, False, {"always": 3}),
        ("qwen2", {"kernels": "on"}, True, {"always": 3}),
        ("gemma3_text", {"kernels": "on"}, True, {"always": 3}),
        ("llama", {"kernels": "on", "weights": "int8"}, True, {"always": 3}),
        ("llama", {"weights": "int8"}, True, None),
        ("qwen2", {}, True, None),
    ],
)
def test_vllm_runs_records(
    family: str,
    ours: dict[str, str],
    eager: bool,
    records: dict[str, int] | None,
    tiny: Callable[..., Any],
    random_mask: Callable[..., Any],
    ids: torch.Tensor,
    tmp_path: Path,
    ask_vllm: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    model = pruned(tiny, random_mask, family, **SIZES)
    options = {
        "dtype": "float32",
        "enforce_eager": eager,
        "skip_tokenizer_init": True,
        "additional_config": {"pyprune": ours},
    }
    folder = str(checkpoint.save(model, tmp_path / "pruned"))
    found = ask_vllm({"model": folder, "options": options, **asked(ids)})
    assert records is None or found["records"] == records
    check_same(found, model, ids, rounded="weights" in ours)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_vllm_takes_a_mask_at_start(
    family: str,
    tiny: Callable[..., Any],
    random_mask: Callable[..., Any],
    ids: torch.Tensor,
    tmp_path: Path,
    ask_vllm: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    sizes = {"gpt2": {"n_embd": 128, "n_head": 2}}.get(family, SIZES)
    model = tiny(family, **sizes)
    model.save_pretrained(tmp_path / "dense")
    random_mask(model, DIFFERING).save(tmp_path / "mask.safetensors")
    prune(model, mask=random_mask(model, DIFFERING), repair=None)
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "additional_config": {"pyprune": {"mask": str(tmp_path / "mask.safetensors")}},
    }
    check_same(ask_vllm({"model": str(tmp_path / "dense"), "options": options, **asked(ids)}), model, ids)
