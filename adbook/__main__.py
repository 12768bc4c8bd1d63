"""The command line: python -m adbook COMMAND."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; a user's mistake gives one line on stderr, and 2."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        print(f"adbook: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nadbook: stopped; what is finished is kept, and is not made again", file=sys.stderr)
        return 130
    return 0


def book(options: argparse.Namespace) -> None:
    """Execute the chapters and build the book."""
    from adbook.book import BookError, build

    try:
        site = build(options.profile, options.output)
    except BookError as error:
        sys.exit(f"\nadbook: {error}")
    print(f"\nThe book is at {(site / 'index.html').as_uri()}")
    print(f"To serve it: {sys.executable} -m http.server --directory {site}")


def histories(options: argparse.Namespace) -> None:
    """Record the learning histories of a source on a family, and put them into the data set."""
    from adbook import experiments
    from adbook.recipes import check_request, follow

    for split in options.split:
        check_request(options.family, options.source, split, options.tasks)
    folder, limits = experiments.RUNS / "histories", {"tasks": options.tasks, "n_jobs": options.jobs}
    for split in options.split:
        made = experiments.provenance()
        path = follow(options.family, options.source, split, folder=folder, made=made, **limits)
        print(path or f"{options.tasks} of the {split} tasks are in {folder / options.family}")


def oracle(options: argparse.Namespace) -> None:
    """Train the expert of a family that is shown the goal."""
    from adbook import experiments, recipes
    from adbook.files import check_writable
    from adbook.oracle import FOLDER, train_oracle
    from adbook.tasks import family

    config = recipes.oracle_config(options.family)
    check_writable(FOLDER)
    trained = train_oracle(family(options.family), config, options.seed)
    trained.about |= {"made": experiments.provenance()}
    print(trained.save(FOLDER / f"{options.family}.safetensors"))


def sources(options: argparse.Namespace) -> None:
    """Score every source of the data set between random actions and the oracle, and write the numbers."""
    from adbook.results import save_result
    from adbook.source_scores import source_scores, update_card

    scores = source_scores()
    print(save_result("sources", scores))
    print(update_card(scores))


def train(options: argparse.Namespace) -> None:
    """Train agents on the histories of a family, and put their weights into artifacts/checkpoints."""
    import torch

    from adbook import experiments
    from adbook.checkpoints import CHECKPOINTS, publish, train_on_gpu
    from adbook.files import check_writable
    from adbook.results import with_seeds

    settings = experiments.profile(options.profile, options.family)
    runs = with_seeds(options.agents, options.seeds, options.once)
    wanted = [replace(experiments.as_agent(settings, agent), seed=seed) for agent, seed in runs]
    check_writable(CHECKPOINTS)
    if torch.cuda.is_available() and options.profile != "paper":  # its models fill a GPU alone, and have to resume
        train_on_gpu(wanted)
    for one in wanted:
        print(publish(one))


def results(options: argparse.Namespace) -> None:
    """Roll every agent out on held-out tasks, with controls, and write the numbers the book shows; train what lacks."""
    from adbook import experiments
    from adbook.checkpoints import write_card
    from adbook.files import check_writable
    from adbook.results import (
        check_agents,
        check_replaces,
        check_seeds,
        in_context,
        known_result,
        save_result,
        with_seeds,
    )

    name = f"{options.family}-{options.profile}"
    check_seeds(options.seeds)
    check_agents(options.agents, options.once)
    check_replaces(name, options.seeds, options.agents, options.once)
    check_writable(experiments.RESULTS)
    train(options)
    settings = experiments.profile(options.profile, options.family)
    result = in_context(settings, options.seeds, options.agents, options.once, known_result(name))
    print(save_result(name, result))
    for agent, seed in with_seeds(options.agents, options.seeds, options.once):
        print(write_card(replace(experiments.as_agent(settings, agent), seed=seed), result))


def baselines(options: argparse.Namespace) -> None:
    """Meta-train MACAW and MQL, play them on held-out tasks, write the numbers; keep the first seed's networks."""
    from adbook import experiments
    from adbook.baselines.runs import BASELINES, baselines, publish
    from adbook.files import check_writable
    from adbook.results import check_replaces, check_seeds, known_result, save_result

    name = f"baselines-{options.family}-{options.profile}"
    check_seeds(options.seeds)
    check_replaces(name, options.seeds)
    for folder in (experiments.RESULTS, BASELINES, experiments.RUNS / "baselines"):
        check_writable(folder)
    settings = experiments.profile(options.profile, options.family)
    print(save_result(name, baselines(settings, options.seeds, known=known_result(name))))
    for path in publish(replace(settings, seed=options.seeds[0])):
        print(path)


def trial(options: argparse.Namespace) -> None:
    """Train one policy with some settings changed, measure it on fresh tasks, and note it among what was tried."""
    from adbook import experiments, metrics
    from adbook.files import check_writable
    from adbook.trials import keep, trial

    check_writable(experiments.RESULTS)
    settings = experiments.profile(options.profile, options.family, options.seed)
    settings = experiments.as_agent(settings, options.agent)
    row = trial(settings, options.changes)
    scores = metrics.normalized_score(row["returns"], row["bounds"]["random"], row["bounds"]["oracle"])
    print("score by episode (0 random, 1 oracle; IQM):", metrics.iqm(scores[None]).round(2).tolist())
    print(f"return by episode: {row['returns'].mean(0).round(1).tolist()}; {row['minutes']:.0f} minutes of training")
    print(f"{len(keep(row))} trials are noted")


def ablations(options: argparse.Namespace) -> None:
    """Train variants that differ in one factor, three seeds each, and write their returns."""
    from adbook import experiments
    from adbook.files import check_writable
    from adbook.results import ablations, check_replaces, check_seeds, save_result

    name = f"ablations-{options.family}-{options.profile}"
    check_seeds(options.seeds)
    check_replaces(name, options.seeds)
    check_writable(experiments.RESULTS)
    settings = experiments.profile(options.profile, options.family)
    half = max(settings.training.updates // 2, settings.training.warmup + 1)
    updates = half if options.updates is None else options.updates
    print(save_result(name, ablations(settings, updates, options.seeds)))


def bench(options: argparse.Namespace) -> None:
    """Measure speeds as ratios within one run, and write them."""
    import torch

    from adbook import bench, experiments
    from adbook.checks import check_known
    from adbook.files import check_writable
    from adbook.results import save_result

    for name in options.names:
        check_known("benchmark", name, bench.BENCHMARKS)
    check_writable(experiments.RESULTS / "bench")
    possible = [name for name in bench.BENCHMARKS if name != "gpu" or torch.cuda.is_available()]
    for name in options.names or possible:
        measured = bench.BENCHMARKS[name]() | {"made": experiments.provenance()}
        plain = {key: value for key, value in measured.items() if not isinstance(value, dict)}
        print(name, {key: round(value, 3) if isinstance(value, float) else value for key, value in plain.items()})
        print(save_result(name, measured, experiments.RESULTS / "bench"))


def pictures(options: argparse.Namespace) -> None:
    """Take the README's pictures anew, of the book that `make book` built."""
    from adbook.pictures import take_pictures

    for path in take_pictures():
        print(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m adbook", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = commands.add_parser("book", help=book.__doc__, description=book.__doc__)
    command.add_argument("--profile", default="laptop", help="smoke, laptop (the default) or paper")
    command.add_argument("--output", type=Path, help="folder for the built book (default: _build)")
    command.set_defaults(run=book)
    for run in (train, results, ablations, baselines):
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        command.add_argument("--profile", default="laptop", help="smoke, laptop (the default) or paper")
        command.add_argument("--family", default="reacher-goal", help="a task family")
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds (default: 0 1 2)")
        command.set_defaults(run=run)
        if run in (train, results):
            agents = ["mamba", "transformer", "decision-transformer"]
            command.add_argument("--agents", nargs="+", default=agents, help="agents (default: all)")
            command.add_argument("--once", nargs="+", default=[], help="those of them that have the first seed alone")
        if run is ablations:
            command.add_argument("--updates", type=int, help="of each variant (default: half of the profile's)")
    command = commands.add_parser("trial", help=trial.__doc__, description=trial.__doc__)
    command.add_argument("changes", nargs="*", metavar="SETTING=VALUE", help="for example training.updates=3000")
    command.add_argument("--profile", default="laptop", help="smoke, laptop (the default) or paper")
    command.add_argument("--family", default="reacher-goal", help="a task family")
    command.add_argument("--agent", default="mamba", help="mamba (the default), transformer or decision-transformer")
    command.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    command.set_defaults(run=trial)
    command = commands.add_parser("histories", help=histories.__doc__, description=histories.__doc__)
    command.add_argument("--family", required=True, help="a task family")
    command.add_argument("--source", help="ppo, sac or droq (default: the one that serves the family best)")
    command.add_argument("--split", nargs="+", default=["train", "test"], help="train, test or both (the default)")
    command.add_argument("--tasks", type=int, help="record only so many of a split, and leave the data set alone")
    command.add_argument("--jobs", type=int, default=-1, help="processes (default: one a core)")
    command.set_defaults(run=histories)
    command = commands.add_parser("oracle", help=oracle.__doc__, description=oracle.__doc__)
    command.add_argument("--family", required=True, help="a task family")
    command.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    command.set_defaults(run=oracle)
    command = commands.add_parser("sources", help=sources.__doc__, description=sources.__doc__)
    command.set_defaults(run=sources)
    command = commands.add_parser("bench", help=bench.__doc__, description=bench.__doc__)
    names = "scan, gpu, training, rollout, context, sources, droq, player or exhibit (default: all that can run here)"
    command.add_argument("names", nargs="*", metavar="NAME", help=names)
    command.set_defaults(run=bench)
    command = commands.add_parser("pictures", help=pictures.__doc__, description=pictures.__doc__)
    command.set_defaults(run=pictures)
    return parser


if __name__ == "__main__":
    sys.exit(main())
