// Light or dark, before the first paint. A choice made on the page wins over the system's.
(() => {
  let theme = null;
  try {
    theme = localStorage.getItem("gemel.theme");
  } catch {
    // Storage may be forbidden; then the system decides.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
