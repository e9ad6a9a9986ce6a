"""Mistakes in a command line: each is told in a sentence with what was probably meant."""

import shlex

import pytest

from stablefield.cli.entry import main
from stablefield.cli.mistakes import checked
from stablefield.cli.usage import as_flags


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trian digits", ["no verb trian", "Did you mean train?", "compare"]),
        ("eval runs/a", ["Did you mean evaluate?"]),
        ("generate runs/a", ["Did you mean sample?"]),
        ("photos", ["no verb photos", "The verbs: train"]),
        ("--device cpu train digits", ["--device stands before the verb"]),
        ("data pakc a b", ["pack, encode or inspect, not pakc", "data pack"]),
        ("train digits --stepz 3", ["no flag --stepz", "did you mean --steps (Optimiser steps)?", "train --help"]),
        (
            "train digits --accumlate 2",
            ["no flag --accumlate", "did you mean --gradient-accumulation-steps (Number"],
        ),
        ("train digits --mend-gradient", ["did you mean --nan-to-num"]),
        ("train digits --leraning-rate 3", ["--learning-rate"]),
        ("sample run --step 3", ["--steps"]),
        ("train digits --width 3", ["--network.width"]),
        ("train digits --xyzzy", ["no flag --xyzzy", "none like it"]),
        ("train digits --epochs 3", ["--steps", "images x epochs"]),
        ("train --data digits", ["without a flag"]),
        ("train digits --gpu 0", ["--device cuda"]),
        ("train digits --fp16", ["--precision bf16"]),
        ("train digits --warmup 3", ["--ramp-images"]),
        ("train digits --wandb", ["--tracker wandb"]),
        ("sample run --num-samples 64", ["--seeds 0-63"]),
        ("compare digits --target dsm", ["no flag --target", "both targets"]),
        ("compare digits --seed 3", ["--seeds"]),
        ("train digits --steps", ["--steps lacks its value", "a whole number"]),
        ("train digits --out --resume", ["--out lacks its value", "--out=--resume"]),
        ("sample run --guidance-interval 1", ["--guidance-interval lacks values", "2 values"]),
        ("train digits --steps many", ["--steps is many", "a whole number"]),
        ("train digits --steps=1.5", ["--steps is 1.5", "a whole number"]),
        ("train digits --learning-rate fast", ["--learning-rate is fast", "a number"]),
        ("train digits --target ddpm", ["--target is ddpm", "stf or dsm"]),
        ("train digits --references some", ["a whole number, auto, all or sharded"]),
        ("train digits --mirror=yes", ["--mirror takes no value"]),
        ("train my photos", ["photos is one too many", "quotes"]),
        ("evaluate grids photos", ["photos is one too many", "--data photos"]),
        ("export run folder", ["folder is one too many", "--out folder"]),
        ("sample run --count 4", ["--seeds 0-63"]),
        ("data pack photos --out p.safetensors", ["name it after DATA"]),
        ("doctor now", ["doctor takes no now"]),
        ("sample run --class one --class three", ["--class is given twice: give all of its values after one"]),
        ("evaluate run --metrics frechet --metrics kernel", ["--metrics is given twice"]),
        ("sample", ["RUN is missing", "The run's folder"]),
        ("sample --class shoes runs/a", ["RUN is missing", "--class took runs/a, too: name what has no flag first"]),
        ("export run", ["--out is missing"]),
        ("data pack digits", ["DEST is missing"]),
    ],
)
def test_a_mistake_is_one_sentence_with_what_was_meant(
    line: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(shlex.split(line))
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("stablefield: ")
    assert told.err.count("\n") == 1
    assert [word for word in words if word not in told.err] == [], told.err


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("train digits --lr 3 --batch-size 4", "train digits --learning-rate 3 --batch 4"),
        ("train digits --image_size=8 -o x", "train digits --resolution=8 --out x"),
        ("train digits --iters 3 --flip --class-cond", "train digits --steps 3 --mirror --conditional"),
        ("train digits --learning_rate 3", "train digits --learning-rate 3"),
        ("sample run --cfg-scale 2 --class-label -1", "sample run --guidance-scale 2 --class -1"),
        ("evaluate run --dataset d --num-samples 3", "evaluate run --data d --samples 3"),
        ("train digits --noise-levels.mean -1.2", "train digits --noise-levels.mean -1.2"),
        ("train digits --no-mirror --steps 3", "train digits --no-mirror --steps 3"),
        ("ema run --length 0.05 0.1 --step 3", "ema run --length 0.05 0.1 --step 3"),
    ],
)
def test_usual_names_are_understood(line: str, same: str) -> None:
    assert checked(shlex.split(line)) == shlex.split(same)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("samples=5: use more.", "--samples 5: use more."),
        ("held_out=a has images; open it with resolution=8.", "--held-out a has images; open it with --resolution 8."),
        ("seed=-1: pass a whole number.", "--first-seed -1: pass a whole number."),
        ("data is missing: name them.", "DATA is missing: name them."),
        ("the data is damaged: k=3, subset_size=4, a = b.", "the data is damaged: k=3, subset_size=4, a = b."),
        ("subset_size is 7: too many.", "subset_size is 7: too many."),
        ("runs/samples=8,seed=3/a.png is damaged.", "runs/samples=8,seed=3/a.png is damaged."),
        ("data/split=train/mirror=True is empty.", "data/split=train/mirror=True is empty."),
    ],
)
def test_an_argument_in_an_error_of_the_library_becomes_the_flag(message: str, words: str) -> None:
    assert as_flags(message, {"seed": "--first-seed", "data": "DATA"}) == words
