// Before the page is drawn: the theme that was chosen, so that nothing flashes.
try {
  const chosen = localStorage.getItem("theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
} catch { /* a browser may keep nothing for file:// */ }
document.documentElement.classList.add("js");
