// Puts the exhibit where a page asks for it: <div class="adbook-exhibit" data-family="reacher-goal"></div>, with what
// adbook.export wrote in a folder of that name beside this script.

import { exhibit } from "./exhibit.js";
import { Reacher } from "./reacher.js";

const AGAIN = "Load the page again; if that does not help, build the book again.";

async function fetched(name, read) {
  let answer;
  try {
    answer = await fetch(new URL(name, import.meta.url), { cache: "no-cache" });
    if (answer.ok) return await answer[read]();
  } catch {
    throw new Error(`${name} could not be loaded: the server does not answer as it should. ${AGAIN}`);
  }
  throw new Error(`${name} could not be loaded: the server says ${answer.status}. ${AGAIN}`);
}

async function physics(family) {
  if (family === "reacher-goal") return new Reacher();
  const xml = await fetched(`${family}/robot.xml`, "text");
  let robot;
  try {
    ({ robot } = await import("./mujoco.js"));
  } catch {
    throw new Error(`MuJoCo for browsers could not be loaded. ${AGAIN}`);
  }
  return robot(family, xml);
}

async function load(family) {
  const [header, weights, environment] = await Promise.all([
    fetched(`${family}/policy.json`, "json"),
    fetched(`${family}/weights.bin`, "arrayBuffer"),
    physics(family),
  ]);
  return { header, weights, environment };
}

const places = document.querySelectorAll(".adbook-exhibit");

function show() {
  for (const place of places) exhibit(place, place.dataset.family, () => load(place.dataset.family));
}

function fail() {
  for (const place of places) place.textContent = `exhibit.css could not be loaded. ${AGAIN}`;
}

// Not before its style is there: a canvas without one takes the size of its picture, and the picture that of the canvas.
const style = document.createElement("link");
Object.assign(style, { rel: "stylesheet", href: new URL("exhibit.css", import.meta.url).href });
style.addEventListener("load", show);
style.addEventListener("error", fail);
document.head.append(style);
