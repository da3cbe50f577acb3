"""Which model some weights are of: as a run, where a conversion wants one, and as YAML beside weights without a run."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from crystal_hpc.config.schema import Data, LearningRate, Model, Mup, Phase, Run
from crystal_hpc.convert.names import Shape
from crystal_hpc.errors import CheckpointError

MODEL_FILE = "model.yaml"
_IRRELEVANT = {"init_std"}  # says how weights began, not what they are


def as_run(shape: Shape, longest: int, precision: str, name: str = "converted") -> Run:
    """A run of this model, with sequences of `longest` tokens; its data are nowhere, and it cannot be trained."""
    phase = Phase(
        name="none", sequence_length=longest, batch_size=1, steps=1, mixture={"none": 1.0},
        learning_rate=LearningRate(peak=1.0),
    )  # fmt: skip
    data = Data(tokenizer="none", sources={"none": "none"})
    kind: Any = precision
    return Run(name=name, precision=kind, model=shape.model, mup=shape.mup, data=data, phases=[phase])


def write_model(folder: Path, shape: Shape, longest: int, origin: str) -> None:
    """Writes `model.yaml`: the sections of a run's config that fit the weights, ready to paste."""
    sections: dict[str, Any] = {"model": shape.model.model_dump()}
    if shape.mup:
        sections["mup"] = shape.mup.model_dump()
    head = f"# The model of these weights, from {origin}: for the config of a run that begins with them.\n"
    head += f"# It was trained on sequences of at most {longest} tokens.\n"
    if shape.mup is None:
        head += "# It has no `mup` section.\n"
    (folder / MODEL_FILE).write_text(head + yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")


def read_model(folder: Path) -> Shape:
    """The model that `write_model` wrote down. Raises CheckpointError where it did not."""
    path = folder / MODEL_FILE
    try:
        content = yaml.safe_load(path.read_bytes())
        mup = content.get("mup")
        return Shape(Model.model_validate(content["model"]), None if mup is None else Mup.model_validate(mup))
    except (OSError, yaml.YAMLError, ValidationError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); convert the weights again"
        ) from error


def check_same(wanted: Shape, found: Shape, where: str) -> None:
    """Raises CheckpointError, in one line that names each field in which the models differ."""
    ours, theirs = _fields(wanted), _fields(found)
    differing = [f"{key} = {ours.get(key)}, not {value}" for key, value in theirs.items() if ours.get(key) != value]
    differing += [f"{key} = {ours[key]}, and they have none" for key in ours.keys() - theirs.keys()]
    if differing:
        raise CheckpointError(f"{where}: its weights do not fit the run, which has {'; '.join(sorted(differing))}")


def _fields(shape: Shape) -> dict[str, Any]:
    model = {f"model.{key}": value for key, value in shape.model.model_dump(exclude=_IRRELEVANT).items()}
    return model | ({f"mup.{key}": value for key, value in shape.mup.model_dump().items()} if shape.mup else {})
