"""``slimkit teach``: knowledge for students elsewhere, in files or from a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from slimkit.distill.knowledge import NetworkTeacher

__all__ = ["dump_command", "serve_command", "teach_app", "token_command"]

teach_app = typer.Typer(help="Write what a teacher knows, or serve it to students elsewhere.")

RecipeFile = Annotated[
    Path, typer.Argument(help="The student's recipe: data, seed and teachers.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change a setting; may be repeated."),
]
TeacherName = Annotated[
    str | None,
    typer.Option(
        help="A name under teachers:, or a stage whose result teaches.",
        show_default="the only one under teachers:",
    ),
]
KeyNames = Annotated[
    list[str] | None,
    typer.Option(
        "--key", help="logits, or the path of a layer; repeatable.", show_default="logits"
    ),
]
Dtype = Annotated[str, typer.Option(help="float16 or float32.")]
TopK = Annotated[
    int | None, typer.Option(min=1, help="Keep so many logits of a sample.", show_default="all")
]
BatchSize = Annotated[int, typer.Option(min=1, max=65_536, help="Samples per forward.")]
Devices = Annotated[
    list[str] | None,
    typer.Option("--device", help="Runs one copy; repeatable.", show_default="cpu"),
]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16 or autocast.")]


@teach_app.callback(invoke_without_command=True)
def _teach(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@teach_app.command("dump")
def dump_command(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option("--out", help="Folder to write or to continue.")],
    teacher: TeacherName = None,
    set_: Overrides = None,
    key: KeyNames = None,
    passes: Annotated[
        int, typer.Option(min=1, help="Over the images, each with other fixed random changes.")
    ] = 1,
    dtype: Dtype = "float16",
    top_k: TopK = None,
    batch_size: BatchSize = 128,
    device: Devices = None,
    precision: Precision = "auto",
    shard: Annotated[int, typer.Option(min=1, help="Samples per file.")] = 4096,
) -> None:
    """Write what a teacher knows about the training images into files.

    An interrupted dump goes on where it was when the same command is given again.
    """
    from slimkit.cli.console import errors, output
    from slimkit.distill.knowledge import dump

    options = {"dtype": dtype, "top_k": top_k, "batch_size": batch_size, "precision": precision}
    network = _teacher(recipe, set_, teacher, key, device, options)

    def progress(done: int, total: int) -> None:
        errors.print(f"{out}: {done} of {total} shards", markup=False)

    index = dump(network, out, passes=passes, shard_rows=shard, progress=progress)
    size = sum(file.bytes for file in index.shards)
    known = index.description
    output.print(
        f"{out}: {known.samples} samples × {passes} passes of {', '.join(known.names)}, "
        f"{size / 1e6:,.1f} MB",
        markup=False,
    )


@teach_app.command("serve")
def serve_command(  # noqa: PLR0913, PLR0917 - one option each
    recipe: RecipeFile,
    teacher: TeacherName = None,
    set_: Overrides = None,
    key: KeyNames = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.")] = 0,
    dtype: Dtype = "float16",
    top_k: TopK = None,
    batch_size: BatchSize = 128,
    device: Devices = None,
    precision: Precision = "auto",
    secret_file: Annotated[
        Path | None, typer.Option(help="Students then need a token: slimkit teach token.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file.")] = None,
    client_ca: Annotated[
        Path | None, typer.Option(help="PEM file of who signs the students' certificates.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let other machines in without TLS and a secret.")
    ] = False,
) -> None:
    """Answer students about the training images until Ctrl-C."""
    from slimkit.cli.console import output
    from slimkit.distill.knowledge import TLSFiles, serve
    from slimkit.errors import InputError

    if (tls_cert is None) != (tls_key is None):
        raise InputError("a certificate and its key go together", where="--tls-cert")
    if client_ca is not None and tls_cert is None:
        raise InputError(
            "students' certificates can be asked for over TLS only",
            where="--client-ca",
            hint="give --tls-cert and --tls-key, too",
        )
    secret = _secret(secret_file) if secret_file else None
    tls = TLSFiles(tls_cert, tls_key, client_ca) if tls_cert and tls_key else None
    options = {"dtype": dtype, "top_k": top_k, "batch_size": batch_size, "precision": precision}
    network = _teacher(recipe, set_, teacher, key, device, options)
    with serve(network, host=host, port=port, secret=secret, tls=tls, insecure=insecure) as server:
        output.print(f"serving {network.schema.teacher} at {server.address}", markup=False)
        output.file.flush()
        server.wait()


@teach_app.command("token")
def token_command(
    secret_file: Annotated[Path, typer.Option(help="The teacher's secret.")],
    hours: Annotated[
        float, typer.Option(min=0, max=87_660, help="How long it is good; ten years at most.")
    ] = 24.0,
) -> None:
    """Print a token for a student, for $SLIMKIT_TOKEN."""
    from slimkit.distill.knowledge import issue_token

    typer.echo(issue_token(_secret(secret_file), 3600 * hours))


def _secret(path: Path) -> bytes:
    from slimkit.artifact import read_bytes

    return read_bytes(path).strip()


def _teacher(
    recipe: Path,
    overrides: list[str] | None,
    name: str | None,
    keys: list[str] | None,
    devices: list[str] | None,
    options: dict[str, Any],
) -> NetworkTeacher:
    from slimkit.cli.console import note
    from slimkit.recipe import load_recipe
    from slimkit.recipe.stages.knowledge import recipe_teacher

    chosen = {"keys": keys or ["logits"], "devices": devices or ["cpu"], **options}
    return recipe_teacher(load_recipe(recipe, overrides or (), tell=note), name, **chosen)
