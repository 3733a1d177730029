"""The page as a Hugging Face Space; `mats-hub ui` opens the same page on this machine."""

from __future__ import annotations

import os

from merge_page import THEME, build

demo = build()

if __name__ == "__main__":
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    demo.launch(theme=THEME, ssr_mode=False, show_error=True, mcp_server=False)
