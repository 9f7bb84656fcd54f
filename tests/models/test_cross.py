"""The two-tower class where it meets transformers: heads, loss, saving, generate, Trainer, peft, checkpointing."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from jam.errors import CheckpointError
from jam.models.cross import LORA_TARGETS, JamCrossForCausalLM
from jam.models.cross_config import JamCrossConfig
from jam.models.heads import allowed_ids, next_heads, restrict
from jam.models.load import Bundle, load_bundle
from jam.models.tower import build_tower
from jam.tokens.render import IMAGE_HEAD, TEXT_HEAD, render
from tests import step_zero
from tests.tiny import CODES_PER_IMAGE, tiny_document, tiny_pair
from tests.tiny_cross import tiny_cross


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cross")


@pytest.fixture(scope="module")
def pair(root: Path) -> tuple[Path, Path]:
    return tiny_pair(root / "pair", image_hidden_size=48, image_num_hidden_layers=2)


@pytest.fixture(scope="module")
def folder(root: Path, pair: tuple[Path, Path]) -> Path:
    return tiny_cross(root / "fused", *pair, gate=0.5)


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return load_bundle(folder, torch.float64)


@pytest.fixture(scope="module")
def shared(root: Path, pair: tuple[Path, Path]) -> Bundle:
    return load_bundle(tiny_cross(root / "shared", *pair, gate=0.5, tables="shared"), torch.float64)


def ids_of(bundle: Bundle, seed: int = 0, images: int = 1) -> torch.Tensor:
    tokens = render(tiny_document(seed, images), bundle.vocabulary, bundle.text)
    return torch.from_numpy(tokens.ids).long()[None]


# ---------------------------------------------------------------- heads and loss


@pytest.mark.parametrize("name", ["bundle", "shared"])
@torch.no_grad()
def test_heads_on_their_rows_equal_both_heads_everywhere(request: pytest.FixtureRequest, name: str) -> None:
    fused: Bundle = request.getfixturevalue(name)
    model: JamCrossForCausalLM = fused.model
    ids = ids_of(fused, images=2)
    heads = next_heads(ids, fused.vocabulary)
    assert {0, 1} == set(heads.flatten().tolist())
    text, image = model.states(ids)
    if name == "shared":
        both = [model.joint(text, image)] * 2
    else:
        both = [model.text.lm_head(text), model.image.lm_head(image)]
    naive = torch.where((heads == IMAGE_HEAD)[..., None], both[IMAGE_HEAD], both[TEXT_HEAD])
    naive = restrict(naive, heads, allowed_ids(fused.vocabulary))
    torch.testing.assert_close(model.logits(text, image, heads), naive, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_compiled_code_takes_the_path_without_data_dependent_shapes(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(bundle)
    expected = bundle.model(ids).logits
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)
    torch.testing.assert_close(bundle.model(ids).logits, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_wrapped_head_is_called_whole(bundle: Bundle) -> None:
    """LoRA on a head replaces it by a module that knows no slices."""
    ids = ids_of(bundle)
    expected = bundle.model(ids).logits
    model = deepcopy(bundle.model)
    model.text.lm_head = torch.nn.Sequential(model.text.lm_head)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "image"), [("mistral", "mistral"), ("gemma2", "mistral"), ("gemma3_text", "gemma3_text")]
)
def test_towers_with_sliding_windows_answer_as_the_loop_without_a_cache(tmp_path: Path, text: str, image: str) -> None:
    """Where every layer has a window, nobody else asks for the mask that cross-attention reads."""
    pair = {"family": (text, image), "sliding_window": (6, 6), "num_hidden_layers": (2, 2)}
    changes = {f"{side}_{key}": values[n] for key, values in pair.items() for n, side in enumerate(("text", "image"))}
    fused, _, _ = step_zero.fuse(tmp_path, **changes)
    tokens, codes = step_zero.answers(fused)
    assert tokens > 0 and codes == CODES_PER_IMAGE


def test_loss_is_each_positions_own_softmax(bundle: Bundle) -> None:
    ids = ids_of(bundle)
    labels = ids.clone()
    labels[0, 3] = -100
    loss = bundle.model(ids, labels=labels).loss
    heads = next_heads(ids, bundle.vocabulary)
    text, image = bundle.model.states(ids)
    full = {TEXT_HEAD: bundle.model.text.lm_head(text)[0], IMAGE_HEAD: bundle.model.image.lm_head(image)[0]}
    allowed = allowed_ids(bundle.vocabulary)
    losses = []
    for at in range(ids.shape[1] - 1):
        head = int(heads[0, at])
        if labels[0, at + 1] >= 0:
            own = full[head][at].masked_fill(~allowed[head], -torch.inf).float()
            losses.append(-own.log_softmax(-1)[labels[0, at + 1]])
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)


def test_a_text_batch_gives_every_tower_parameter_a_gradient(bundle: Bundle) -> None:
    """Else a rank with text only would wait for one with images in the gradient's reduction."""
    ids = torch.tensor([[0, *bundle.text.encode("only words in it"), 2]])
    bundle.model(ids, labels=ids).loss.backward()
    assert [name for name, parameter in bundle.model.named_parameters() if parameter.grad is None] == []
    bundle.model.zero_grad()


def test_a_filled_cache_needs_the_heads(bundle: Bundle) -> None:
    ids = ids_of(bundle)
    cache = bundle.model(ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="head_ids are required"):
        bundle.model(ids[:, 4:5], past_key_values=cache)


def test_logits_to_keep(bundle: Bundle) -> None:
    ids = ids_of(bundle)
    whole = bundle.model(ids).logits
    torch.testing.assert_close(bundle.model(ids, logits_to_keep=2).logits, whole[:, -2:])
    some = torch.tensor([3, 9])
    torch.testing.assert_close(bundle.model(ids, logits_to_keep=some).logits, whole[:, some])


@torch.no_grad()
def test_one_softmax_is_for_shared_tables_only(bundle: Bundle, shared: Bundle) -> None:
    ids = ids_of(shared)
    heads = next_heads(ids, shared.vocabulary)
    joint, _ = shared.logits(ids, heads, softmax="joint")
    own, _ = shared.logits(ids, heads)
    torch.testing.assert_close(restrict(joint, heads, allowed_ids(shared.vocabulary)), own)
    assert joint.min() > torch.finfo(joint.dtype).min
    with pytest.raises(ValueError, match="two heads that share no scale"):
        bundle.model(ids, restricted=False)


# ---------------------------------------------------------------- towers and config


def test_exchanges_must_run_forwards(folder: Path) -> None:
    raw = JamCrossConfig.from_pretrained(folder).to_dict()
    for wrong in ([[4, 2], [2, 1]], [[5, 2]], [[0, 1]], [[2]]):
        with pytest.raises(Exception, match="exchanges"):
            JamCrossConfig(**raw | {"exchanges": wrong})


def test_an_unknown_tower_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'mamba' cannot be a tower; opt, llama"):
        build_tower(AutoConfig.for_model("mamba"), 0)


def test_both_tables_are_resized_together(folder: Path) -> None:
    bundle = load_bundle(folder)
    ids = ids_of(bundle)
    before = bundle.model(ids).logits
    bundle.model.resize_token_embeddings(before.shape[-1] + 3, mean_resizing=False)
    for tower in (bundle.model.text, bundle.model.image):
        assert tower.get_input_embeddings().weight.shape[0] == before.shape[-1] + 3
        assert tower.lm_head.weight is tower.get_input_embeddings().weight
    after = bundle.model(ids).logits
    torch.testing.assert_close(after[..., :-3], before)
    assert (after[..., -3:] == torch.finfo(after.dtype).min).all()


def test_gradient_checkpointing_gives_the_same_gradients(folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load_bundle(folder).model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.cross[0].gradient_checkpointing and model.image.model.decoder.layers[0].gradient_checkpointing
        ids = torch.arange(20, 40)[None]
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0, msg=name)


# ---------------------------------------------------------------- save, generate, train


@pytest.mark.parametrize("name", ["bundle", "shared"])
def test_saved_and_reloaded_is_bit_equal(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    before = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name).path)
    before.save_pretrained(tmp_path)
    after, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(after) is JamCrossForCausalLM
    assert not any(info.values())
    assert after.config.to_diff_dict() == before.config.to_diff_dict()
    assert list(after.state_dict()) == list(before.state_dict())
    for key, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[key], tensor), key


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generate_equals_the_naive_loop(bundle: Bundle, cache: str) -> None:
    model: JamCrossForCausalLM = bundle.model
    prompts = [[0, *bundle.text.encode("the cat")], [0, *bundle.text.encode("a red one"), 5, 290]]
    naive = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        naive.append(ids[0, len(prompt) :].tolist())
    width = max(map(len, prompts))
    ids = torch.tensor([[1] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        cache_implementation=cache,
    )
    assert out[:, width:].tolist() == naive
    assert naive[0] != naive[1]


def test_trainer_trains(folder: Path, tmp_path: Path) -> None:
    bundle = load_bundle(folder)
    before = deepcopy(bundle.model.state_dict())
    rows = [ids_of(bundle, seed, 1)[0] for seed in range(8)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_steps=2, logging_steps=1,
    )  # fmt: skip
    Trainer(bundle.model, arguments, train_dataset=data).train()
    moved = [name for name, tensor in bundle.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert {"cross.0.text.gate", "text.model.decoder.embed_tokens.weight", "image.lm_head.weight"} <= set(moved)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    for name, tensor in bundle.model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor), name


def test_lora_starts_as_the_base_and_reloads(folder: Path, tmp_path: Path) -> None:
    bundle = load_bundle(folder)
    ids = ids_of(bundle)
    expected = bundle.model(ids).logits
    wrapped = get_peft_model(bundle.model, LoraConfig(r=2, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"))
    adapted = [name for name, _ in wrapped.named_parameters() if "lora_A" in name]
    for part in (
        "text.model.decoder.layers.0.self_attn.q_proj",
        "image.model.decoder.layers.1.fc2",
        "cross.0.image.fc1",
    ):
        assert any(part in name for name in adapted), part
    assert torch.equal(wrapped(input_ids=ids).logits, expected)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = wrapped(input_ids=ids).logits
    assert (trained - expected).abs().max() > 1e-3
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_bundle(folder).model, tmp_path)
    assert torch.equal(again(input_ids=ids).logits, trained)
