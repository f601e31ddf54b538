"""`infc serve`: an artifact behind the OpenAI API."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import click

from ...runtime.server.settings import Limit, limits
from ..threads_option import threads_option


def _limit_options(command: Callable[..., None]) -> Callable[..., None]:
    """An option for each numeric setting of the server, in the order of their declaration."""
    for limit in reversed(list(limits())):
        command = _option_of(limit)(command)
    return command


def _option_of(limit: Limit) -> Callable[[Callable[..., None]], Callable[..., None]]:
    default = "" if limit.default is None else f"  [default: {limit.default:.12g}]"
    return click.option(
        limit.flag,
        type=int if limit.is_whole else float,
        metavar=limit.unit.upper(),
        help=f"{limit.doc}{default}",
    )


def _read_key(context: click.Context, option: click.Parameter, path: str | None) -> str | None:
    """The key in a file: its first line."""
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            key = file.readline().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise click.BadParameter(f"{path} cannot be read: {reason}") from None
    if not key:
        raise click.BadParameter(f"the first line of {path} is empty")
    return key


@click.command("serve")
@click.argument("artifact")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option(
    "--model-name",
    "--served-model-name",
    metavar="NAME",
    multiple=True,
    help="Name in the API, once or more; the artifact's by default.",
)
@click.option("--api-key", envvar="INFC_API_KEY", help="Required of clients; or $INFC_API_KEY.")
@click.option(
    "--api-key-file", metavar="FILE", callback=_read_key, help="The key is its first line."
)
@click.option("--open-metrics", is_flag=True, help="/metrics needs no key.")
@threads_option("as compiled by default")
@click.option(
    "--weights",
    type=click.Choice(["auto", "mapped", "copied"]),
    help="Where weights lie; as compiled by default.",
)
@click.option("--max-context", type=click.IntRange(min=2), help="At most the compiled one.")
@click.option("--max-sequences", type=click.IntRange(min=1), help="At most the compiled one.")
@click.option("--kv-memory", metavar="SIZE", help="Memory for attention state, such as 1GiB.")
@click.option(
    "--itl-target-ms",
    type=click.IntRange(min=0),
    help="Time from a token to the next that prompts of others are cut for; 0: none.",
)
@click.option("--log-requests", is_flag=True, help="A line on stderr for each request.")
@click.option("--log-prompts", is_flag=True, help="What was asked, too.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="For people, or an object a line.",
)
@click.option(
    "--verify",
    type=click.Choice(["stamp", "full", "none"]),
    default="stamp",
    show_default=True,
    help="Which files are read whole first: changed ones, all, none.",
)
@_limit_options
def command(
    artifact: str,
    host: str,
    port: int,
    model_name: tuple[str, ...],
    api_key: str | None,
    api_key_file: str | None,
    threads: int | None,
    weights: str | None,
    max_context: int | None,
    max_sequences: int | None,
    kv_memory: str | None,
    itl_target_ms: int | None,
    verify: str,
    log_prompts: bool,
    log_requests: bool,
    **settings: Any,
) -> None:
    """Serve completions and chat over HTTP.

    \b
      infc serve tiny.infc
      infc serve tiny.infc --host 0.0.0.0 --port 80 --api-key-file key.txt
      curl localhost:8000/v1/completions -d '{"model": "tiny", "prompt": "def"}' \\
           -H 'Content-Type: application/json'
    """
    from typing import cast

    from ...ir.artifact import Verification
    from ...runtime.limits import RuntimeOptions
    from ...runtime.server.run import serve

    if api_key is not None and not api_key.strip():
        raise click.UsageError("the API key is empty: leave it out, or give one")
    if api_key is not None and api_key_file is not None and api_key != api_key_file:
        raise click.UsageError(
            "--api-key (or $INFC_API_KEY) and --api-key-file give two keys: leave one out"
        )
    options = RuntimeOptions(
        threads=threads,
        weights=weights,
        max_context=max_context,
        max_sequences=max_sequences,
        kv_memory=kv_memory,
        itl_target_ms=itl_target_ms,
    )
    interrupted = serve(
        artifact,
        host=host,
        port=port,
        model_name=model_name,
        api_key=api_key_file or api_key,
        options=options,
        verify=cast("Verification", verify),
        log_requests=log_requests or log_prompts,
        log_prompts=log_prompts,
        **{name: value for name, value in settings.items() if value is not None},
    )
    if interrupted:  # as shells expect it; that it stopped cleanly is no error to print
        raise click.exceptions.Exit(128 + signal.SIGINT)
