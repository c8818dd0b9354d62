"""The SMILES models of ``pretrained/smiles``: their strings and densities, what they draw, and how they are trained."""

import argparse
import hashlib
import itertools
import json
import os
import re
import types
from pathlib import Path

import pytest
import torch
from imported import pretrained
from rdkit import Chem, rdBase
from transformers import AutoModelForCausalLM, AutoTokenizer

SMILES = Path(__file__).parents[1] / "pretrained" / "smiles"
NAMES = ("prior", "seh", "sa", "qed")
MODULES = ("tokens", "network", "moses", "scores", "pace", "policy", "cards", "recipe")
SOME = ["CC(=O)Oc1ccccc1C(=O)O", "Cc1cc(C(=O)NCc2ccco2)n[nH]1", "N#Cc1ccc(Br)cc1Cl", "C"]
TEST = Path(os.environ.get("SCULPT_DATA", "")) / "moses" / "test.csv.gz"


tokens, network, moses, scores, pace, policy, cards, recipe = pretrained("smiles", *MODULES)


@pytest.fixture(scope="module")
def prior():
    return network.load(SMILES / "prior")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def encode(smiles):
    return tokens.encode("".join(f"{s}\n" for s in smiles).encode())


def valid(smiles):
    with rdBase.BlockLogs():
        return torch.tensor([Chem.MolFromSmiles(s) is not None for s in smiles]).double()


# Strings


def test_strings_are_tokens_and_back():
    x = encode(SOME)
    assert tokens.decode(x) == SOME and (x == tokens.END).sum() == len(SOME) and (x != tokens.UNKNOWN).all()
    assert tokens.decode(encode(["CC"])[:, :2]) == ["CC("]  # no end, no molecule
    words = tokens.tokenizer()
    for smiles, row in zip(SOME, x.tolist(), strict=True):
        ids = words(f"<seh:16>{smiles}<end>").input_ids
        assert ids == [tokens.prompts("seh")[tokens.BETAS.index(16)], *(i for i in row if i != tokens.PAD)]
        assert words.decode(ids, skip_special_tokens=True) == smiles
    assert words("CPC").input_ids[1] == tokens.UNKNOWN == encode(["CPC"])[0, 1]


@pytest.mark.skipif(not TEST.is_file(), reason="MOSES is not in SCULPT_DATA")
def test_every_string_of_moses_has_tokens():
    smiles, x = moses.smiles("test"), moses.strings("test")
    assert len(smiles) == len(x) == 176_074 and not (x == tokens.UNKNOWN).any() and x.shape[1] <= tokens.LONGEST
    assert tokens.decode(x[:5000]) == smiles[:5000]
    words = tokens.tokenizer()
    for row, s in zip(x[:200].tolist(), smiles, strict=False):
        assert words(s + "<end>").input_ids == [i for i in row if i != tokens.PAD]


# What is shipped


@pytest.mark.parametrize("name", NAMES)
def test_the_card_names_the_weights_that_are_there(name):
    (weights,) = (SMILES / name).rglob("*.safetensors")
    content = weights.read_bytes()
    assert len(content) <= 12e6
    card = (SMILES / name / "README.md").read_text()
    assert re.search(rf"`{weights.name}` \| sha256 {hashlib.sha256(content).hexdigest()} ", card)
    prompts = {f"<{name}:{beta}>" for beta in tokens.BETAS} if name != "prior" else {"<begin>"}
    assert set(re.findall(r'\["(<.*?>)"\]', card)) <= prompts


@pytest.mark.parametrize("name", NAMES)
def test_densities_are_those_of_transformers_one_string_at_a_time(name):
    folder = SMILES / name
    model, words = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    token = tokens.prompts(name)[-1]
    told = network.likelihood(network.load(folder), token, encode(SOME))
    for smiles, log_p in zip(SOME, told, strict=True):
        ids = words(f"{tokens.VOCABULARY[token]}{smiles}<end>", return_tensors="pt").input_ids
        with torch.no_grad():
            log = model(ids).logits[0, :-1].float().log_softmax(-1)
        torch.testing.assert_close(log.gather(1, ids[0, 1:, None]).sum(), log_p, rtol=1e-4, atol=1e-3)


def test_the_prior_knows_molecules_when_it_sees_them(prior):
    good, bad = (network.likelihood(prior, tokens.BEGIN, encode(s)) for s in (SOME[1:2], ["Cc1cc(C(=O)NCc2ccco2)n[nH]2"]))
    assert good > -40 and good > bad + 5


def test_samples_are_mostly_molecules(prior):
    (x,) = network.draw(prior, [tokens.BEGIN], 128, 0)
    smiles = tokens.decode(x)
    assert valid(smiles).mean() > 0.85 and len(set(smiles)) > 120
    # Nothing stands after the end, and what was drawn is likely: about as many nats as the card has.
    after = (x == tokens.END).cumsum(1) - (x == tokens.END).long()
    assert (x[after.bool()] == tokens.PAD).all()
    assert 15 < -network.likelihood(prior, tokens.BEGIN, x).mean() < 25


def test_a_prompt_of_a_larger_exponent_has_better_samples():
    for name in ("seh", "sa", "qed"):
        prompts = tokens.prompts(name)
        drawn = network.draw(network.load(SMILES / name), [prompts[0], prompts[-1]], 64, 0)
        few, many = (scores.REWARDS[name]().rate(tokens.decode(x))[0] for x in drawn)
        assert many.isnan().double().mean() < 0.15
        assert many.nanmean() > few.nanmean() + {"seh": 0.15, "sa": 0.02, "qed": 0.0}[name]


def test_transformers_generates_as_the_card_says():
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(SMILES / "qed")
    model = AutoModelForCausalLM.from_pretrained(SMILES / "qed")
    x = model.generate(**words(["<qed:32>"] * 32, return_tensors="pt"))
    smiles = words.batch_decode(x, skip_special_tokens=True)
    assert valid(smiles).mean() > 0.8 and len(set(smiles)) > 28
    assert model.dtype == torch.float32 and model.generation_config.top_k == 0


# Training


class Lengths:
    """In place of the processes: the more carbon, the better."""

    def begin(self, x, name=None):
        R = [s.count("C") / 60 for s in tokens.decode(x)]
        return [types.SimpleNamespace(result=lambda: R)]


def take(made, steps):
    for _ in itertools.islice(made.training.run(made.loss, made.pace.steps), steps):
        pass
    return made


def begun(monkeypatch, name, state, past=()):
    """A small training."""
    for module in (recipe, policy):
        monkeypatch.setattr(module, "strings", lambda split: encode(SOME * 8))
    options = argparse.Namespace(device="cpu", batch=4, minutes=None, steps=12, rows=32, state=state)
    return recipe.Prior(options) if name == "prior" else policy.Policy(name, options, Lengths(), past)


def test_a_further_training_begins_as_the_saved_policy(tmp_path, monkeypatch):
    past = json.loads((SMILES / "qed" / "training.json").read_text())["runs"]
    made, saved = begun(monkeypatch, "qed", tmp_path, past), network.load(SMILES / "qed").state_dict()
    assert all(torch.equal(value, saved[entry]) for entry, value in made.training.network.state_dict().items())
    assert made.log_Z.values.tolist() == pytest.approx([past[-1]["log_Z"][str(beta)] for beta in tokens.BETAS])
    assert made.training.identity["past"] == len(past)  # a second further training has a state of its own


@pytest.mark.parametrize("name", ["prior", "seh"])
def test_a_killed_training_goes_on_bit_for_bit(name, tmp_path, monkeypatch):
    def make(state):
        return begun(monkeypatch, name, tmp_path / state)

    # A policy draws new strings every eight steps.
    through, first = take(make("a"), 12), take(make("b"), 6)
    first.training.save()
    again = take(make("b"), 6)
    assert again.training.step == 12
    for part in ("network", "average"):
        one, two = (getattr(made.training, part).state_dict() for made in (through, again))
        assert all(torch.equal(value, two[entry]) for entry, value in one.items())
    if name != "prior":
        assert torch.equal(through.log_Z.values, again.log_Z.values) and torch.equal(through.own.x, again.own.x)


def test_a_training_by_the_clock_ends_where_its_time_does(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    made = pace.Pace(100 / 60, None)
    for step in itertools.count(1):
        now[0] += 0.1 if step < 300 else 0.2  # another job comes
        made.look(step)
        if step >= made.steps:
            break
    assert 90 < made.spent < 110 and 500 < step < 700
