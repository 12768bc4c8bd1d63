// The exhibit as an anywidget: what adbook.export wrote lies in the widget's state.

import { exhibit } from "./exhibit.js";
import { Reacher } from "./reacher.js";

function render({ model, el }) {
  const { buffer, byteOffset, byteLength } = model.get("weights");
  const weights = buffer.slice(byteOffset, byteOffset + byteLength);
  const load = async () => ({ header: model.get("header"), weights, environment: new Reacher() });
  return exhibit(el, "reacher-goal", load, { seed: model.get("seed"), goal: model.get("goal") });
}

export default { render };
