"""Language models on every road against all of their sequences, and against transformers itself."""

import functools
import pickle
import subprocess
import sys

import pytest
import torch
from token_models import Recurrent, causal, causal_models, densities, over_floor, recurrent_models, sequences
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import sculpt
from sculpt.actions.reading import read
from sculpt.chain import Settings
from sculpt.formula import Nested, Posterior
from sculpt.tokens.networks import TokenFeatures
from sculpt.tokens.sampling import Sampling

N = 4000
KINDS = {"recurrent": recurrent_models, "transformer": causal_models}
MODELS = functools.cache(lambda kind, m: tuple(KINDS[kind](m)))
CLASSIFIER = functools.cache(lambda kind: sculpt.fit(MODELS(kind, 2), steps=300, samples=2000, batch_size=32, progress=False))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def compositions(models):
    p, q, *rest = models
    named = {"harmonic mean": p & q, "contrast": p - q, "product": sculpt.product([p, q], [1.0, 0.5])}
    if rest:
        named = {"labels": sculpt.posterior(models, (0, 1, 2)), "nested": (p & q) - rest[0]}
    return named


def target(composition):
    """Its exact distribution over all sequences."""
    ell = densities(composition.leaves)
    if not any(model.models for model in composition.models):
        return composition.formula.value(ell).softmax(0)
    inner = composition.models[0].formula
    log_z = float(inner.value(ell[:, :2]).logsumexp(0))
    return Nested(composition.formula, [inner, Posterior(1, (0,))], [(0, 1), (2,)], [log_z, 0.0]).value(ell).softmax(0)


@pytest.mark.parametrize("kind", KINDS)
def test_densities_sum_to_one_over_all_sequences_and_the_model_samples_them(kind):
    model = MODELS(kind, 2)[0]
    p = densities([model])[:, 0].exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-9)
    x = model.sample(N, generator=seeded()).x
    assert over_floor(x, model, p)[1] < 1.25


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_tracked_densities_sample_every_composition(kind, m):
    for name, composition in compositions(MODELS(kind, m)).items():
        exact = target(composition)
        runs = [composition.sample(N, sculpt.Tracked(particles=3 * N), generator=seeded(k), progress=False) for k in range(3)]
        ratio = sum(over_floor(run.x, composition.leaves[0], exact)[1] for run in runs) / 3
        assert ratio < 1.25, (name, ratio)


@pytest.mark.parametrize("correct", [pytest.param(True, marks=pytest.mark.slow), "densities"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_guides_and_corrections_are_exact(kind, correct):
    for name, composition in compositions(MODELS(kind, 2)).items():
        if name == "product":
            continue
        road = sculpt.Guided(CLASSIFIER(kind), correct=correct, particles=3 * N)
        runs = [composition.sample(N, road, generator=seeded(k), progress=False) for k in range(2)]
        ratio = sum(over_floor(run.x, composition.leaves[0], target(composition))[1] for run in runs) / 2
        assert ratio < 1.25, (name, ratio)
        plain = composition.sample(N, CLASSIFIER(kind), generator=seeded(), progress=False)
        assert over_floor(plain.x, composition.leaves[0], target(composition))[1] < 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_rejection_needs_nothing_and_is_exact(kind):
    for m in (2, 3):
        for name, composition in compositions(MODELS(kind, m)).items():
            if name != "product":
                x = composition.sample(N, sculpt.Rejection(), generator=seeded(), progress=False).x
                assert over_floor(x, composition.leaves[0], target(composition))[1] < 1.25, name


def test_a_guided_composition_is_a_base_model_again():
    models, classifier = MODELS("transformer", 3), CLASSIFIER("transformer")
    inner = (models[0] & models[1]).guided(classifier)
    x, place = sequences(models[0])
    log_p = torch.stack([inner.log_ratios([inner], x)[:, 0], models[2].log_p(x)], -1)
    exact = Posterior(2, (0, 1)).value(log_p).softmax(0)
    samples = (inner & models[2]).sample(N, sculpt.Tracked(particles=3 * N), generator=seeded())
    assert over_floor(samples.x, models[0], exact)[1] < 1.25


# What is kept of what was read


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_one_token_and_says_what_reading_everything_says(kind):
    model, new = MODELS(kind, 2)[0], []
    note = lambda _, args, options: new.append(args[0] if args else options["input_ids"])  # noqa: E731
    chain = model.chain(Settings())
    state, _ = chain.start(64, None)
    for t in range(4):
        handle = model.model.register_forward_pre_hook(note, with_kwargs=True)
        reading = read([model], state.states, state.memory)
        handle.remove()
        assert new.pop().shape == (1 if t == 0 else len(reading.states), 1) and not new
        assert torch.allclose(reading.log_p[0][reading.rows].exp(), model.log_pf(state.states).exp(), atol=1e-6)
        state, _ = chain.step(state, torch.zeros(len(state)), seeded(t))
        state = state[~chain.done(state)]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_cache_the_distribution_is_the_same(kind):
    kept, read = (KINDS[kind](2, cache=cache) for cache in (True, False))
    a, b = ((p & q).sample(300, sculpt.Tracked(particles=600), generator=seeded()) for p, q in (kept, read))
    assert torch.equal(a.x, b.x) and a.log_z == pytest.approx(b.log_z, abs=1e-6)


def test_models_of_one_network_are_one_call_and_prompts_of_different_length_are_padded_on_the_left():
    p = sculpt.Tokens(causal(0, 6), vocabulary="abcde.", prompt="a", max_length=4)
    q = p.with_prompt("cabed")
    calls = []
    handle = p.model.register_forward_hook(lambda *_: calls.append(1))
    run = (p & q).sample(500, sculpt.Tracked(particles=1000), generator=seeded())
    handle.remove()
    assert len(calls) == 4 and p.together == q.together
    separate = [causal(0, 6), causal(0, 6)]
    a, b = (
        sculpt.Tokens(net, vocabulary="abcde.", prompt=text, max_length=4)
        for net, text in zip(separate, ("a", "cabed"), strict=True)
    )
    other = (a & b).sample(500, sculpt.Tracked(particles=1000), generator=seeded())
    assert torch.equal(run.x, other.x) and run.log_z == pytest.approx(other.log_z, abs=1e-5)
    assert run.log_p.keys() == {"a", "cabed"}
    namesakes = (sculpt.Tokens(net, vocabulary="abcde.", prompt="a", max_length=4) for net in (causal(0, 6), causal(1, 6)))
    assert list(sculpt.mixture(*namesakes).sample(5, generator=seeded()).log_p) == ["a (0)", "a (1)"]


def test_what_is_kept_is_selected_with_its_particle():
    """A population that is selected at every step, and in which sequences end at different lengths."""
    p, q = MODELS("transformer", 2)
    run = (p & q).sample(N, sculpt.Tracked(particles=N, threshold=1.0), generator=seeded(), progress=False)
    lengths = (run.x >= 0).sum(-1)
    assert len(lengths.unique()) > 2
    assert over_floor(run.x, p, target(p & q))[1] < 1.4


def test_parts_of_a_population_are_one_population():
    p, q = MODELS("transformer", 2)
    whole, parts = ((p & q).sample(400, generator=seeded(), batch_size=size) for size in (None, 100))
    assert abs(whole.log_z - parts.log_z) < 0.1 and len(set(map(len, parts.tokens))) > 2


# transformers itself


def million(seed=0):
    """A model of about a million parameters."""
    return causal(seed, 512, 0.08, 64, n_embd=128, n_layer=4, n_head=4)


def llama(seed=0):
    torch.manual_seed(seed)
    size = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(**size, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=511, eos_token_id=511)
    return LlamaForCausalLM(config)


def loss_of(net, model, x):
    """Minus the log-density, by the network's own loss, one sequence after the other."""
    out = []
    for row in model.vocabulary.tokens(x):
        ids = torch.tensor([[*model.prompt, *row] + ([model.end[0]] if len(row) < model.max_length else [])])
        labels = ids.clone()
        labels[:, : len(model.prompt)] = -100
        out.append(float(net(input_ids=ids, labels=labels).loss) * (ids.shape[1] - len(model.prompt)))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("make", [million, llama])
def test_log_densities_are_the_networks_own_loss(make):
    net = make()
    assert 8e5 < sum(value.numel() for value in net.parameters()) < 2e6
    p = sculpt.Tokens(net, prompt=[5, 6, 7], max_length=20, name="p")
    q = p.with_prompt([9], name="q")
    x = (p & q).sample(20, sculpt.Tracked(particles=40), generator=seeded()).x
    n = (x >= 0).sum(-1)
    with torch.no_grad():
        expected = -torch.stack([loss_of(net, model, x) for model in (p, q)], -1)
    every = torch.stack([model.log_p(x) for model in (p, q)], -1)
    assert ((every - expected).abs() / (n + 1)[:, None]).max() < 1e-4
    for k in n.unique().tolist():
        assert ((token_by_token([p, q], x[n == k]) - expected[n == k]).abs() / (k + 1)).max() < 1e-4


def token_by_token(models, x):
    """Log-densities of sequences of one length, as a chain reads them: all prompts in one call, shorter ones padded on the left."""
    first, n, memory, ell = models[0], int((x[0] >= 0).sum()), None, 0.0
    for t in range(min(n + 1, first.max_length)):
        states = torch.where(torch.arange(first.max_length) < t, x, -1)
        log_p, memory = first.read(models, states, memory)
        action = torch.where(x[:, t] < 0, first.n_actions - 1, x[:, t])
        ell = ell + torch.stack([table.gather(1, action[:, None])[:, 0] for table in log_p], -1)
    return ell


def others():
    """Rotary positions, a sliding window, biases instead of positions, and a memory that is no cache of keys and values."""
    ends = {"vocab_size": 12, "eos_token_id": 0, "bos_token_id": 1, "hidden_size": 16}
    heads = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    yield Qwen2ForCausalLM(Qwen2Config(**ends, **heads, max_position_embeddings=64))
    yield MistralForCausalLM(MistralConfig(**ends, **heads, max_position_embeddings=64, sliding_window=4))
    yield BloomForCausalLM(BloomConfig(**ends, n_layer=2, n_head=2))
    yield MambaForCausalLM(MambaConfig(**ends, state_size=4, num_hidden_layers=2))


def test_other_architectures_read_prompts_of_different_length_token_by_token():
    for net in others():
        p = sculpt.Tokens(net, prompt=[1, 2], max_length=10, name=type(net).__name__)
        q = p.with_prompt([3], name="q")
        assert p.network.remembers != isinstance(net, MambaForCausalLM)
        x = (p & q).sample(30, sculpt.Tracked(particles=60), generator=seeded()).x
        x = x[(x >= 0).sum(-1) == (x >= 0).sum(-1).max()]
        assert (token_by_token([p, q], x) - torch.stack([p.log_p(x), q.log_p(x)], -1)).abs().max() < 1e-5


def test_a_model_of_peft_is_one_with_its_adapter():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    model = sculpt.Tokens(peft.get_peft_model(causal(0, 8), config), max_length=5, name="tuned")
    base = model.with_adapters({}, name="base")
    x = base.sample(20, generator=seeded()).x
    assert model.network.adapters == {"default": 1.0} and not torch.allclose(model.log_p(x), base.log_p(x))
    assert torch.allclose(base.log_p(x), sculpt.Tokens(causal(0, 8), max_length=5).log_p(x), atol=1e-5)


def test_loras_are_base_models_that_share_the_weights():
    peft = pytest.importorskip("peft")
    net = million()
    for name, seed in (("ink", 1), ("oil", 2)):
        torch.manual_seed(seed)
        net.add_adapter(peft.LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False), adapter_name=name)
    base = sculpt.Tokens(net, prompt=[5], max_length=12, name="base").with_adapters({}, name="base")
    ink, oil, half = (
        base.with_adapters({"ink": 1.0}),
        base.with_adapters({"oil": 1.0}),
        base.with_adapters({"ink": 0.5}, name="half"),
    )
    x = base.sample(10, generator=seeded()).x
    wanted = {}
    for name in ("ink", "oil"):
        net.set_adapter(name)
        wanted[name] = loss_of(net, base, x)
    net.set_adapter("oil")
    requires = [value.requires_grad for value in net.parameters()]
    for name, model in (("ink", ink), ("oil", oil)):
        assert (model.log_p(x) + wanted[name]).abs().max() / 12 < 1e-4
    assert [value.requires_grad for value in net.parameters()] == requires and net.active_adapters() == ["oil"]
    net.disable_adapters()
    assert (base.log_p(x) + loss_of(net, base, x)).abs().max() / 12 < 1e-4
    assert len({model.key for model in (base, ink, oil, half)}) == 4 and str(ink) == "base + ink"
    assert not torch.allclose(half.log_p(x), ink.log_p(x)) and ink.together != oil.together
    run = (ink - oil).sample(50, sculpt.Tracked(particles=100), generator=seeded())
    assert list(run.log_p) == ["base + ink", "base + oil"]
    with pytest.raises(ValueError, match="no adapter 'chalk'; it has ink, oil"):
        base.with_adapters({"chalk": 1.0})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_have_log_densities_in_full(dtype):
    model = sculpt.Tokens(causal(0, 8, 0.3).to(dtype), max_length=5, name="half")
    x = model.sample(200, generator=seeded()).x
    log_p = model.log_p(x)
    assert log_p.dtype == torch.float64 and log_p.isfinite().all()
    table = model.log_pf(x[:5])
    assert float((table.exp().sum(-1) - 1).abs().max()) < 1e-9


def test_options_of_generate_make_the_distribution_that_generate_samples():
    from transformers import (
        LogitsProcessorList,
        MinLengthLogitsProcessor,
        SuppressTokensLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = 3 * torch.randn(50, 12, generator=seeded())
    theirs = LogitsProcessorList(
        [
            SuppressTokensLogitsProcessor([3]),
            MinLengthLogitsProcessor(2, 11),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(6),
            TopPLogitsWarper(0.8),
        ]
    )
    options = Sampling(temperature=0.7, top_k=6, top_p=0.8, min_length=2, suppress=[3])
    for t in (1, 2):
        expected = theirs(torch.zeros(50, t, dtype=torch.long), logits.clone()).softmax(-1)
        got = options.log_p(logits, (11,), torch.tensor(t < 2)).exp()
        assert torch.allclose(got[:, -1], expected[:, 11].double(), atol=1e-6)
        assert torch.allclose(got[:, :11], expected[:, :11].double(), atol=1e-6) and (got[:, 11] == 0).all()


def test_options_are_a_part_of_the_density():
    base = causal_models(1)[0]
    for changes in ({"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.7}, {"min_length": 2}, {"suppress": [0]}):
        model = base.with_sampling(**changes)
        p = densities([model])[:, 0].exp()
        assert float(p.sum()) == pytest.approx(1, abs=1e-9) and model.key != base.key
        assert over_floor(model.sample(N, generator=seeded()).x, model, p)[1] < 1.25
        if "min_length" in changes:
            assert (p[(sequences(model)[0] >= 0).sum(-1) < 2] == 0).all()


def test_supports_that_are_disjoint_leave_what_both_have_and_no_nan():
    p, q = (model.with_sampling(top_k=2) for model in causal_models(2))
    exact = target(p & q)
    assert not exact.isnan().any() and (exact == 0).any()
    run = (p & q).sample(N, sculpt.Tracked(particles=4 * N), generator=seeded(), progress=False)
    assert over_floor(run.x, p, exact)[1] < 1.4
    both = torch.tensor([run.log_p["t0"], run.log_p["t1"]])
    assert both.isfinite().all()
    none = [base.with_sampling(suppress=kept) for base, kept in zip(causal_models(2), ([0, 1], [2]), strict=True)]
    ell = densities([m.with_sampling(min_length=1) for m in none])
    assert (Posterior(2, (0, 1)).value(ell) == -torch.inf).all()
    with pytest.raises(FloatingPointError, match="weight zero"):
        (none[0].with_sampling(min_length=1) & none[1].with_sampling(min_length=1)).sample(
            10, generator=seeded(), progress=False
        )


def test_a_text_that_has_a_stop_string_ends_there():
    model = sculpt.Tokens(causal(3), vocabulary="ab\n.", max_length=5, stop="b\n")
    x, _ = sequences(model)
    p, texts = model.log_p(x).exp(), model.decode(x)
    assert float(p.sum()) == pytest.approx(1, abs=1e-9)
    assert all((value == 0) == ("b\n" in text[:-1]) for value, text in zip(p.tolist(), texts, strict=True))
    samples = model.sample(N, generator=seeded())
    assert over_floor(samples.x, model, p)[1] < 1.25 and any(text.endswith("b\n") for text in samples.text)


def test_several_end_tokens_are_one_end():
    model = sculpt.Tokens(causal(1, 5), end=[3, 4], max_length=3, name="two ends")
    p = densities([model])[:, 0].exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-9) and not (model.sample(500, generator=seeded()).x > 2).any()


# Results, files, folders


def words(size=20):
    """A tokenizer of single letters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    table = {word: i for i, word in enumerate(["<end>", *"abcdefghijklmnopqrstuvwxyz"[: size - 1]])}
    made = Tokenizer(models.WordLevel(table, unk_token="<end>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    made.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


@pytest.fixture
def folder(tmp_path):
    net = causal(0, 20, 0.3)
    net.config.eos_token_id = net.config.bos_token_id = net.generation_config.eos_token_id = (
        net.generation_config.bos_token_id
    ) = 0
    net.save_pretrained(tmp_path / "letters")
    words().save_pretrained(tmp_path / "letters")
    return tmp_path / "letters"


def test_a_folder_of_transformers_loads_with_its_prompt_and_samples_text(folder):
    p = sculpt.load(folder, prompt="ab", max_length=8)
    q = sculpt.load(folder, prompt="cde", max_length=8, temperature=0.8, dtype=torch.bfloat16)
    assert (str(p), str(q), p.prompt, p.end) == ("letters[ab]", "letters[cde]", (1, 2), (0,))
    assert q.model.dtype == torch.bfloat16 and not p.model.training and not next(p.model.parameters()).requires_grad
    assert p.key == sculpt.load(folder, prompt="ab", max_length=8).key
    samples = (p & q).sample(50, generator=seeded())
    assert all(
        set(text) <= set("abcdefghijklmnopqrs") and len(text) == len(row)
        for text, row in zip(samples.text, samples.tokens, strict=True)
    )
    assert list(samples.table()) == ["text", "length", "weight", "log p: letters[ab]", "log p: letters[cde]"]
    assert sculpt.load(folder).max_length == 32
    with pytest.raises(ValueError, match="guidance_scale: no option of a language model, which takes prompt, max_length"):
        sculpt.load(folder, guidance_scale=2)


def test_results_are_kept_without_their_models(folder, tmp_path):
    p = sculpt.load(folder, prompt="ab", max_length=8)
    samples = (p & p.with_prompt("c", name="c")).sample(20, generator=seeded())
    samples.save(tmp_path / "texts.safetensors")
    read = sculpt.Samples.load(tmp_path / "texts.safetensors")
    for other in (read, pickle.loads(pickle.dumps(samples))):
        assert other.text == samples.text and other.log_p == samples.log_p and other.tokens == samples.tokens
    part = sculpt.Samples.cat([read[:5], read[5:]])
    assert part.log_p == read.log_p and read[3].text == [samples.text[3]] and read[:2].log_p["c"] == samples.log_p["c"][:2]
    samples.save(tmp_path / "texts.parquet")
    assert samples.to_frame().shape == (20, 5)
    assert samples.picture()[0] == "text" and samples.to("cpu").text == samples.text


def test_a_classifier_of_tokens_is_saved_and_read(tmp_path):
    classifier = CLASSIFIER("transformer")
    classifier.save_pretrained(tmp_path / "c")
    again, (p, q) = sculpt.load(tmp_path / "c"), MODELS("transformer", 2)
    assert isinstance(again.network, TokenFeatures)
    a, b = ((p & q).sample(100, c, generator=seeded()) for c in (classifier, again))
    assert torch.equal(a.x, b.x)


def test_the_smiles_policies_of_this_repository_load_and_compose():
    from pathlib import Path

    folder = Path(__file__).parents[1] / "pretrained" / "smiles" / "seh"
    models = [sculpt.load(folder, prompt="<seh:0>", suppress=range(28, 67))]
    models.append(models[0].with_prompt("<seh:8>", name="eight"))
    assert models[0].max_length == 63 and models[0].together == models[1].together
    samples = (models[0] & models[1]).sample(10, sculpt.Tracked(particles=20), generator=seeded())
    assert len(samples.log_p) == 2 and all("<" not in text for text in samples.text)


def test_a_recurrent_network_of_torchgfn_is_a_model_of_its_own():
    from gfn.utils.modules import RecurrentDiscreteSequenceModel, TransformerDiscreteSequenceModel

    torch.manual_seed(0)
    for net in (RecurrentDiscreteSequenceModel(4, 8, 8, 2), TransformerDiscreteSequenceModel(4, 8, 2, 16, 1, 8)):
        model = sculpt.Tokens(net, vocabulary=4, end=3, prompt=[4], max_length=4, name=type(net).__name__)
        p = densities([model])[:, 0].exp()
        assert float(p.sum()) == pytest.approx(1, abs=1e-9)
        assert over_floor(model.sample(N, generator=seeded()).x, model, p)[1] < 1.25


def test_the_same_seed_gives_the_same_sequences_and_training_mode_does_not_matter():
    p, q = MODELS("transformer", 2)
    state = torch.get_rng_state()
    a, b = ((p & q).sample(50, generator=seeded(3)) for _ in range(2))
    assert torch.equal(a.x, b.x) and torch.equal(state, torch.get_rng_state())
    assert not p.model.training and a.diagnostics.seed == 3


def test_importing_the_package_imports_no_transformers():
    code = "import sys, sculpt; sculpt.Tokens; assert 'transformers' not in sys.modules and 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Bad input


def test_bad_input_is_refused_before_time_is_spent(folder):
    net = causal(0)
    p = sculpt.Tokens(net, max_length=4, name="p")
    for options, error, words_ in (
        ({"end": 9}, ValueError, "Token 9 is none of"),
        ({"max_length": 40}, ValueError, "The prompt has 1 tokens and the model reads 32"),
        ({"prompt": [0] * 40}, ValueError, "Shorten the prompt"),
        ({"prompt": [7]}, ValueError, "The prompt has a token 7, and GPT2LMHeadModel knows 4 tokens"),
        ({"sampling": Sampling(suppress=[3])}, ValueError, "no sequence would ever end"),
        ({"sampling": Sampling(min_length=5), "max_length": 4}, ValueError, "min_length=5 is more than max_length=4"),
        ({"vocabulary": 6}, ValueError, r"logits of shape \(2, 1, 4\); expected one for each of 6 tokens"),
    ):
        with pytest.raises(error, match=words_):
            sculpt.Tokens(net, **options)
    with pytest.raises(ValueError, match="Which token ends a sequence"):
        sculpt.Tokens(Recurrent(0), vocabulary=4)
    with pytest.raises(ValueError, match="How many tokens are there"):
        sculpt.Tokens(Recurrent(0), end=3)
    with pytest.raises(ValueError, match=r"logits of shape \(2, 1, 4\); expected one for each of 5 tokens"):
        sculpt.Tokens(Recurrent(0), vocabulary=5, end=3)
    with pytest.raises(ValueError, match=r"answered with a Tensor, expected the pair \(logits, cache\)"):
        sculpt.Tokens(lambda tokens, cache: torch.zeros(*tokens.shape, 4), vocabulary=4, end=3)
    with pytest.raises(ValueError, match=r"keeps a tensor of shape \(1, 2, 16\) for 2 sequences"):
        sculpt.Tokens(lambda tokens, cache: (torch.zeros(*tokens.shape, 4), torch.zeros(1, 2, 16)), vocabulary=4, end=3)
    with pytest.raises(FloatingPointError, match="logits that are no numbers"):
        sculpt.Tokens(lambda tokens, cache: (torch.full((*tokens.shape, 4), torch.nan), None), vocabulary=4, end=3)
    with pytest.raises(ValueError, match="temperature divides the logits"):
        p.with_sampling(temperature=0.0)
    for other, words_ in (
        (
            sculpt.Tokens(causal(1, 5), max_length=4, name="q"),
            "p and q cannot be composed: their tokens differ, a vocabulary of 4 tokens and",
        ),
        (sculpt.Tokens(causal(1), max_length=3, name="q"), "max_length is 4 on one side, 3 on the other"),
        (sculpt.Tokens(causal(1), max_length=4, end=2, name="q"), r"end is \(3,\) on one side, \(2,\) on the other"),
        (sculpt.Tokens(causal(1), max_length=4, vocabulary="abc.", name="q"), "What helps: models fine-tuned from one"),
    ):
        with pytest.raises(ValueError, match=words_):
            p & other


def test_logits_that_are_no_numbers_on_the_way_name_the_model_and_the_state():
    def network(tokens, cache):
        n = 0 if cache is None else int(cache[0])
        logits = torch.zeros(*tokens.shape, 4)
        return (logits if n < 2 else logits * torch.nan), torch.full((len(tokens),), n + 1)

    model = sculpt.Tokens(network, vocabulary=4, end=3, max_length=6, name="broken")
    with pytest.raises(
        FloatingPointError, match=r"broken gave no distribution over its actions for \d+ of \d+ states, first for \["
    ):
        model.sample(20, generator=seeded(), progress=False)


def test_a_note_says_how_many_sequences_were_cut():
    model = sculpt.Tokens(causal(0), max_length=2, name="short").with_sampling(min_length=2)
    assert "100 of 100 sequences have max_length=2 tokens, and were cut there" in model.sample(100).diagnostics.notes
    assert not sculpt.Tokens(causal(0), end=(), prompt=[0], max_length=2, name="fixed").sample(10).diagnostics.notes


@pytest.mark.parametrize(("file", "entry", "value", "words_"), [
    ("config.json", "model_type", "my-own", "a causal language model of the installed transformers"),
    ("config.json", "n_layer", 10**9, "n_layer"),
    ("config.json", "n_embd", 32, "do not fit the GPT2LMHeadModel"),
    ("config.json", "quantization_config", {"bits": 4}, "dequantize"),
    ("generation_config.json", "eos_token_id", "x", "eos_token_id is 'x'"),
    ("tokenizer_config.json", "model_max_length", "x", "model_max_length is 'x', expected a number"),
])  # fmt: skip
def test_what_a_folder_says_is_checked(folder, file, entry, value, words_):
    import json

    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    with pytest.raises(ValueError, match=words_):
        sculpt.load(folder)


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="may run any code"):
        sculpt.load(folder)


def test_cross_entropy_is_what_the_density_is():
    model = causal_models(1)[0]
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([[3, 0, 1, 2]])).logits[0]
    expected = -F.cross_entropy(logits, torch.tensor([0, 1, 2, 3]), reduction="sum")
    assert float(model.log_p(torch.tensor([[0, 1, 2, -1]]))) == pytest.approx(float(expected), abs=1e-5)
