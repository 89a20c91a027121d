"""A page of HTML that needs nothing else: neither a network nor, to be read, JavaScript.

Everything that comes from data is hostile until it is escaped: text by `escaped`, numbers and names as JSON in a
script element that does not run, with <, > and & spelled as escapes, from where the page's script takes it into text
nodes alone.  Should that fail, the page's Content-Security-Policy still runs no script and takes no style but the two
whose digests it names.  It takes no style attribute either: what has a size of its own is drawn as SVG.
"""

import base64
import hashlib
import json
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from shared.token_text import visible

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
"""Colours and type, coloured tokens, the panel of one token."""
SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
"""`watchTokens`, and what goes into a panel."""
PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src '$style_digest'; \
script-src '$script_digest'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
$body
<script type="application/json" id="data">$data</script>
<script>$script</script>
</body>
</html>
""")


def html_document(*, title: str, body: str, data: Any, style: str, script: str) -> str:
    """The page; `body` is HTML, `title` is text, and `data` is what the script finds in the element `data`."""
    return PAGE.substitute(
        title=escaped(title),
        body=body,
        data=_script_json(data),
        style=style,
        script=script,
        style_digest=_digest(style),
        script_digest=_digest(script),
    )


def escaped(text: str) -> str:
    """Text from data, for an element or a quoted attribute."""
    return escape(visible(text))


def escaped_token(part: str) -> str:
    """Text of a row.  Line feeds and tabs get a mark that is no text: what is copied from the page is the row."""
    return escaped(part).replace("\n", "<b></b>\n").replace("\t", "<u></u>\t")


def _digest(source: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _script_json(tree: Any) -> str:
    """JSON that neither ends the script element that holds it nor opens anything in it."""
    text = json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
