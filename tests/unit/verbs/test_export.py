"""An export is a plain Hugging Face folder that gives what the live model gave."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from alignlab.errors import StorageError
from alignlab.runs import export

HERE = Path(__file__).parent
TOLERANCE = 1e-5
"""Between our attention over packed rows and transformers' own padded forward, fp32, summed over a row's targets."""
LORA = ["peft=lora", "peft.lora_r=4"]


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


spawn = _module(HERE.parents[1] / "distributed" / "spawn.py").spawn
cells = _module(HERE / "export_cells.py")

SETTINGS = {
    "dpo": ["model=tied", "objective=dpo"],
    "untied": ["model=untied", "objective=dpo"],
    "reward": ["model=tied", "objective=reward"],
    "reward, untied": ["model=untied", "objective=reward"],
    "lora": ["model=tied", "objective=dpo", *LORA],
    "reward, lora": ["model=untied", "objective=reward", *LORA],
}
ONE = {name: [*words, "engine=local"] for name, words in SETTINGS.items()} | {
    "pad is eos": ["model=pad-is-eos", "objective=reward", "engine=local"],
    "template": ["model=tied", "objective=sft", "engine=local", "model.chat_template=mine.jinja"],
}
TWO = {f"{name}, zero3": [*words, "engine=zero3"] for name, words in SETTINGS.items()}
TWO["dpo, zero2"] = [*SETTINGS["dpo"], "engine=zero2"]
LANGUAGE = [name for name in (*ONE, *TWO) if "reward" not in name and name != "pad is eos"]
REWARDS = [name for name in (*ONE, *TWO) if "reward" in name or name == "pad is eos"]
ADAPTED = [name for name in (*ONE, *TWO) if "lora" in name]


class Exports:
    """The run folders of all cells, and what the live models said before they were written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, options in {"tied": {}, "untied": {"tied": False}, "pad-is-eos": {"pad_is_eos": True}}.items():
            cells.make_model(root / name, **options)
        (root / "mine.jinja").write_text(cells.ENDS_WITH_EOS)
        self.ranks: dict[str, list[dict[str, Any]]] = {}
        for number, chosen in {1: ONE, 2: TWO}.items():
            found = spawn(
                HERE / "export_cells.py", "everything", number, root, environment={"ALIGNLAB_CACHE": str(root / "c")},
                folder=str(root / "runs"), cells={name: self._found(words) for name, words in chosen.items()},
            )  # fmt: skip
            self.ranks |= {name: [rank[name] for rank in found] for name in chosen}

    def _found(self, words: list[str]) -> list[str]:
        """Settings with the paths of this folder."""
        moved = []
        for word in words:
            key, _, value = word.partition("=")
            path = self.root / value
            moved.append(f"{key}={path}" if key in ("model", "model.chat_template") and path.exists() else word)
        return moved

    def folder(self, name: str) -> Path:
        return self.root / "runs" / name / "model"

    def live(self, name: str) -> torch.Tensor:
        """[S] float64: the live model's number of every held-out sequence, joined over ranks."""
        pairs = {int(number): value for rank in self.ranks[name] for number, value in rank["live"]}
        assert sorted(pairs) == list(range(len(self.rows(name))))
        return torch.tensor([pairs[number] for number in sorted(pairs)], dtype=torch.float64)

    def rows(self, name: str) -> list[tuple[list[int], list[int]]]:
        return [(tokens, target) for tokens, target in self.ranks[name][0]["rows"]]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("exports"))


def logps(model: Any, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """[S]: sum over targets t of log softmax(logits[t - 1])[token t], one row at a time."""
    found = []
    for tokens, target in rows:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            rates = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        each = rates.gather(1, ids[0, 1:, None])[:, 0]
        found.append((each * torch.tensor(target[1:])).sum())
    return torch.stack(found)


def rewards(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """[S], one row at a time: no padding."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([tokens])).logits[:, 0] for tokens in rows]).double()


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_language_model_gives_the_same_logits(exports: Exports, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(exports.folder(name))
    found = logps(model, exports.rows(name))
    torch.testing.assert_close(found, exports.live(name), rtol=TOLERANCE, atol=0)
    start = AutoModelForCausalLM.from_pretrained(exports.root / ("untied" if "untied" in name else "tied"))
    moved = (found - logps(start, exports.rows(name))).abs().max()
    assert moved > 100 * TOLERANCE * found.abs().max()  # two steps changed what is compared


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_model_gives_the_same_rewards(exports: Exports, name: str) -> None:
    """Alone, and in a batch that its own tokenizer pads, on either side."""
    folder = exports.folder(name)
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert model.config.num_labels == 1
    rows = [tokens for tokens, _ in exports.rows(name)]
    live = exports.live(name)
    assert live.std() > 100 * TOLERANCE * live.abs().max()  # a constant would agree with anything
    torch.testing.assert_close(rewards(model, rows), live, rtol=TOLERANCE, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = tokenizer.batch_decode(rows)
    assert len({len(row) for row in rows}) > 1
    for side in ("right", "left"):
        padded = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt", return_token_type_ids=False)
        assert [ids[mask.bool()].tolist() for ids, mask in zip(*padded.values(), strict=True)] == rows
        with torch.no_grad():
            found = model(**padded).logits[:, 0].double()
        torch.testing.assert_close(found, live, rtol=TOLERANCE, atol=1e-6)


def test_the_pad_token_of_a_reward_model_ends_no_row(exports: Exports) -> None:
    """The trap: transformers reads a reward at the last token that is not the pad token (design.md 7)."""
    folder = exports.folder("pad is eos")
    before, after = (AutoTokenizer.from_pretrained(f) for f in (exports.root / "pad-is-eos", folder))
    rows = [tokens for tokens, _ in exports.rows("pad is eos")]
    assert all(tokens[-1] == before.pad_token_id == before.eos_token_id for tokens in rows)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.pad_token_id == after.pad_token_id != before.pad_token_id
    assert after.eos_token_id == before.eos_token_id
    model.config.pad_token_id = before.pad_token_id  # as it would have been: read one token early
    assert (rewards(model, rows) - exports.live("pad is eos")).abs().max() > 1e-3


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_stands_beside_the_merged_model(exports: Exports, name: str) -> None:
    """Base + adapter through peft is the exported model, and the adapter alone is small."""
    from peft import PeftModel

    base = exports.root / ("untied" if "reward" in name else "tied")
    adapter = exports.folder(name).with_name("adapter")
    rows = exports.rows(name)
    if name in REWARDS:
        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        found = rewards(PeftModel.from_pretrained(plain, adapter), [tokens for tokens, _ in rows])
    else:
        found = logps(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter), rows)
    torch.testing.assert_close(found, exports.live(name), rtol=TOLERANCE, atol=1e-6)
    stored = load_file(adapter / "adapter_model.safetensors")
    assert all("lora_" in key or "score" in key for key in stored)
    whole = load_file(exports.folder(name) / "model.safetensors")
    assert not any("lora" in key or "base_layer" in key for key in whole)


@pytest.mark.parametrize(("name", "tied"), [("dpo", True), ("untied", False), ("dpo, zero3", True)])
def test_tied_embeddings_are_stored_once_and_untied_ones_twice(exports: Exports, name: str, tied: bool) -> None:
    stored = load_file(exports.folder(name) / "model.safetensors")
    assert ("lm_head.weight" in stored) != tied
    model = AutoModelForCausalLM.from_pretrained(exports.folder(name))
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tied


def test_the_template_that_trained_is_saved(exports: Exports) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    texts = {
        name: AutoTokenizer.from_pretrained(exports.folder(name)).apply_chat_template(messages, tokenize=False)
        for name in ("template", "dpo")
    }
    assert texts["template"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>"
    assert texts["dpo"] == texts["template"] + "\n"


def test_an_export_goes_on_training(exports: Exports) -> None:
    """The folder is a model of ours too: a reward model with its head, a language model with its tokenizer."""
    from alignlab.config import ModelConfig
    from alignlab.models.load import load_model

    name = "reward, zero3"
    loaded = load_model(ModelConfig(str(exports.folder(name))), "scalar", torch.float32, seed=5)
    found = rewards(loaded.model, [tokens for tokens, _ in exports.rows(name)])
    torch.testing.assert_close(found, exports.live(name), rtol=TOLERANCE, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# Publishing
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_file_modes_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    """safetensors writes 0600, which a colleague could not read: 0666 without the bits of the umask it must be."""

    def write(folder: Path) -> None:
        (folder / "weights").write_text("")
        (folder / "weights").chmod(0o600)

    before = os.umask(umask)
    try:
        export._publish(tmp_path / "model", write)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "model" / "weights").stat().st_mode & 0o777 == mode


def test_exported_files_are_readable(exports: Exports) -> None:
    umask = os.umask(0)
    os.umask(umask)
    files = [path for path in exports.folder("lora").parent.rglob("*.safetensors") if "checkpoints" not in path.parts]
    assert len(files) == 2  # model/ and adapter/
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_an_existing_export_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def write(text: str, *, fail: bool = False) -> None:
        def into(folder: Path) -> None:
            (folder / text).write_text(text)
            if fail:
                raise OSError(28, "No space left on device")

        export._publish(target, into)

    write("first")
    with pytest.raises(StorageError, match="No space left"):
        write("second", fail=True)
    assert [p.name for p in target.iterdir()] == ["first"]
    write("third")
    assert [p.name for p in target.iterdir()] == ["third"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_is_on_disk_is_compared_with_what_is_in_memory(exports: Exports, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = load_file(exports.folder("untied") / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors")
    export._check(tmp_path, weights)
    name = "lm_head.weight"
    changed = {**weights, name: weights[name] + 1e-3}
    with pytest.raises(StorageError, match=r"lm_head\.weight.*not the model's"):
        export._check(tmp_path, changed)
    with pytest.raises(StorageError, match=r"extra.*not written"):
        export._check(tmp_path, {**weights, "extra": torch.randn(3)})
    save_file({**weights, name: weights[name][:0]}, tmp_path / "model.safetensors")
    with pytest.raises(StorageError, match=r"lm_head\.weight"):
        export._check(tmp_path, weights)
