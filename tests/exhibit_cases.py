"""What the tests of the exhibit share: its pages, as they are and with faults."""

import json
import shutil

from adbook.exhibit import stage

RULES = "default-src 'self'"  # what a page may do, as a server would say
NEEDS_EVAL = "script-src 'self' 'unsafe-eval'; " + RULES  # MuJoCo's script makes functions of text
FAULTS = ("schema", "short", "flipped", "missing", "bare")


def page(family, rules=RULES):
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>The exhibit</title>
      <meta name="viewport" content="width=device-width, initial-scale=1">
      <meta http-equiv="Content-Security-Policy" content="{rules}">
      <main><h1>The exhibit</h1><div class="adbook-exhibit" data-family="{family}">not yet</div></main>
      <script type="module" src="page.js"></script></html>"""


def write_site(folder):
    """A page for each family, one without an exhibit, and for each fault a copy of Reacher's in a folder of its own."""
    stage(folder)
    (folder / "index.html").write_text(page("reacher-goal"))
    (folder / "cheetah.html").write_text(page("half-cheetah-vel", NEEDS_EVAL))
    (folder / "pusher.html").write_text(page("pusher-goal", NEEDS_EVAL))
    (folder / "modules.html").write_text("<!doctype html><title>modules</title>")
    for name in FAULTS:
        copied = shutil.copytree(folder, folder / name, ignore=lambda *_: ("mujoco", *FAULTS))
        _spoil(name, copied / "reacher-goal")
    return folder


def _spoil(name, policy):
    weights, header = policy / "weights.bin", json.loads((policy / "policy.json").read_text())
    damaged = bytearray(weights.read_bytes())
    damaged[1000] ^= 1
    if name == "missing":
        weights.rename(policy / "elsewhere.bin")
    elif name in ("flipped", "short"):
        weights.write_bytes(damaged if name == "flipped" else damaged[:5000])
    else:
        changed = {"schema": 99} if name == "schema" else {"about": {}}
        (policy / "policy.json").write_text(json.dumps(header | changed))
