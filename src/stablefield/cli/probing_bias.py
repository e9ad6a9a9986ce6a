"""The bias check: whether reference policies are unbiased on data, and whether planted faults are seen on them."""

from pathlib import Path

from rich.table import Table

from stablefield.cli.bar import Bar
from stablefield.cli.console import console, relative
from stablefield.cli.probe_files import make_folder, write_json
from stablefield.cli.probing import Probing
from stablefield.data.image_set import ImageSet
from stablefield.diffusion.process import Process
from stablefield.probing.bias import BiasCheck, TargetLike, check_bias
from stablefield.probing.faults import ClassesMixed, SourceLeftOut, SourceTwice
from stablefield.probing.population import Population
from stablefield.probing.record import bias_record
from stablefield.targets.pool import Pool
from stablefield.targets.references import InBatch
from stablefield.targets.stable_target import StableTarget

__all__ = ["probe_bias"]

# Samples that a bias check looks at: the faults that it finds are those of the policy, not of the size.
_CHECKED = 4096


def probe_bias(images: ImageSet, probing: Probing, *, process: Process, by_class: bool, false_alarm: float) -> bool:
    """Test the policies and the faults, print what was seen, and write it.

    Args:
        images: the data.
        probing: what every probe is told.
        process: of the training.
        by_class: whether posteriors stay within classes.
        false_alarm: rate at which an unbiased policy may fail.

    Returns:
        Whether no policy was seen to be biased.

    Raises:
        ValueError: if the data have nothing to measure, a number does not fit, or the folder cannot be made.
    """
    population = probing.population(images, by_class=by_class, most=min(probing.most, _CHECKED))
    out = make_folder(probing.out or Path("probes") / images.name)
    size = min(256, len(population))
    # No more than the pool, which must hold the batch, and few enough that others are left without it.
    rows = min(128, max(2, len(population) // 3))
    sound = _policies(population, size, process)
    faulty = _faults(population, size, process)
    results: dict[str, BiasCheck] = {}
    table = Table("references", "verdict", "p", "max |t|", "direction, noise level", box=None, pad_edge=False)
    with Bar("testing") as bar:
        for number, (name, target) in enumerate((sound | faulty).items()):
            result = check_bias(
                target, population, process=process, batch=rows, false_alarm=false_alarm, seed=probing.seed
            )
            results[name] = result
            bar((number + 1) / len(sound | faulty))
            verdict = "no bias seen" if result.passed else "BIASED"
            where = f"{result.direction}, at {result.noise_level:.2g}"
            table.add_row(
                name if name in sound else f"fault: {name}",
                f"[{'green' if result.passed == (name in sound) else 'red'}]{verdict}[/]",
                f"{result.p_value:.2g}",
                f"{result.statistic:.1f}",
                where,
            )
    console.print(table)
    looked = next(iter(results.values())).rows
    console.print(
        f"{looked:,} training rows each; an unbiased policy fails at a rate of {false_alarm:g}.\n"
        "The faults are planted, to show what the test sees on these data."
    )
    record = {"command": f"{probing.command} --check-bias", "data": images.manifest, "seed": probing.seed}
    record["checks"] = {name: {"planted": name in faulty, **bias_record(r)} for name, r in results.items()}
    console.print(f"written: {relative(write_json(out / 'bias.json', record))}")
    return all(results[name].passed for name in sound)


def _policies(population: Population, size: int, process: Process) -> dict[str, TargetLike]:
    data, labels = population.data, population.labels
    return {
        "the batch": StableTarget(process, references=InBatch()),
        f"a pool of {size:,}": StableTarget(process, references=Pool(data, size, labels)),
        f"all {len(population):,}": StableTarget(process, references=Pool(data, None, labels)),
    }


def _faults(population: Population, size: int, process: Process) -> dict[str, TargetLike]:
    faulty: dict[str, TargetLike] = {
        "source left out": SourceLeftOut(population, size, process=process),
        "source held twice": SourceTwice(population, size, process=process),
    }
    if population.labels is not None:
        faulty["classes mixed"] = ClassesMixed(population, size, process=process)
    return faulty
