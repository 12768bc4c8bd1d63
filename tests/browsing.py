"""What the tests of pages in a browser share: a page that may ask only its own server, and what is heard of it."""

import re
from dataclasses import dataclass, field


@dataclass
class Heard:
    """What happened in a page since `listen`."""

    foreign: list[str] = field(default_factory=list)  # addresses off the server that it asked for
    said: list[str] = field(default_factory=list)  # "type: text" of the console, "error: ..." of scripts and answers


def listen(page, base: str) -> Heard:
    """Block and note whatever a page asks for beyond `base`, and note what its console says and what fails in it."""
    heard = Heard()
    own = re.escape(base) + "/"

    def block(route):
        heard.foreign.append(route.request.url)
        route.abort()

    def connected(socket):  # a route does not see these
        if not re.match(own.replace("http", "ws", 1), socket.url):
            heard.foreign.append(socket.url)

    def answered(response):
        if response.status >= 400:
            heard.said.append(f"error: {response.status} {response.url}")

    page.route(re.compile(rf"^(?!{own}|data:|blob:)"), block)
    page.on("websocket", connected)
    page.on("response", answered)
    page.on("console", lambda message: heard.said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: heard.said.append(f"error: {error}"))
    return heard
