// Runs between require.js and embed-amd.js, and makes widgets work in a page that has no kernel and no network.
(function () {
  "use strict";

  // 1. The widgets' bundle looks for a widget's module with require.js before it turns to a public server: anywidget
  //    is the file beside this one. From the other two names the bundle works out where its icon font lies.
  const here = document.currentScript.src.replace(/[^/]*$/, "");
  const paths = { anywidget: "anywidget", "@jupyter-widgets": "widgets", "@jupyter-widgets/html-manager/dist": "widgets" };
  for (const name in paths) paths[name] = here + paths[name];
  window.requirejs.config({ paths });

  // 2. The theme's icon script replaces <i> elements, and the Play widget then cannot find its own: nest the picture
  //    inside the element instead.
  window.FontAwesomeConfig = { ...window.FontAwesomeConfig, autoReplaceSvg: "nest" };

  // 3. The widgets' bundle calls `MathJax.Hub.Queue`, of version 2, for every label; version 3 has `typesetPromise`.
  //    The global object is replaced while MathJax 3 starts, so whichever object is put there gets a `Hub`. It is not
  //    enumerable: MathJax 3 reads the listed keys of the first such object as its settings.
  let typeset = new Promise((resolve) => window.addEventListener("load", resolve));
  const Hub = {
    Queue([, , element]) {
      typeset = typeset
        .then(() => window.MathJax.startup.promise)
        .then(() => window.MathJax.typesetPromise([element]))
        .catch((error) => console.warn("A widget's label could not be typeset:", error.message));
    },
  };
  let current;
  const withHub = (object) => Object.defineProperty(object, "Hub", { value: Hub, configurable: true });
  const initial = window.MathJax;
  Object.defineProperty(window, "MathJax", {
    configurable: true,
    get: () => current,
    set: (object) => (current = object && withHub(object)),
  });
  window.MathJax = initial;
})();
