"""`infc serve`: an artifact behind the OpenAI API."""

import click


@click.command("serve")
@click.argument("artifact")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--model-name", metavar="NAME", help="Name in the API; the artifact's by default.")
@click.option("--api-key", envvar="INFC_API_KEY", help="Required of clients; or $INFC_API_KEY.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; as compiled by default.")
@click.option("--max-context", type=click.IntRange(min=1), help="At most the compiled one.")
@click.option("--max-sequences", type=click.IntRange(min=1), help="At most the compiled one.")
@click.option("--kv-memory", metavar="SIZE", help="Memory for attention state, such as 1GiB.")
@click.option("--log-requests", is_flag=True, help="A line on stderr for each request.")
@click.option(
    "--verify",
    type=click.Choice(["stamp", "full", "none"]),
    default="stamp",
    show_default=True,
    help="Which files are read whole first: changed ones, all, none.",
)
def command(
    artifact: str,
    host: str,
    port: int,
    model_name: str | None,
    api_key: str | None,
    threads: int | None,
    max_context: int | None,
    max_sequences: int | None,
    kv_memory: str | None,
    log_requests: bool,
    verify: str,
) -> None:
    """Serve completions and chat over HTTP.

    \b
      infc serve tiny.infc
      infc serve tiny.infc --host 0.0.0.0 --port 80 --api-key "$KEY"
      curl localhost:8000/v1/completions -d '{"model": "tiny", "prompt": "def"}' \\
           -H 'Content-Type: application/json'
    """
    from typing import cast

    from ...ir.artifact import Verification
    from ...runtime.limits import RuntimeOptions
    from ...runtime.server.run import serve

    options = RuntimeOptions(
        threads=threads,
        max_context=max_context,
        max_sequences=max_sequences,
        kv_memory=kv_memory,
    )
    serve(
        artifact,
        host=host,
        port=port,
        model_name=model_name,
        api_key=api_key,
        log_requests=log_requests,
        options=options,
        verify=cast("Verification", verify),
    )
