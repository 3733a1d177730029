"""The page as a Hugging Face Space; `mats-hub ui` opens the same page on this machine."""

from __future__ import annotations

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from merge_page import THEME, build

demo = build()


def serve(port: int | None = None) -> None:
    """Serve the page until it is stopped; on this machine alone, but for a Space."""
    demo.queue(default_concurrency_limit=4, max_size=64)
    demo.launch(
        theme=THEME, ssr_mode=False, show_error=True, server_port=port, max_file_size="20mb", run_history=False,
        mcp_server=True,
    )  # fmt: skip


if __name__ == "__main__":
    serve()
