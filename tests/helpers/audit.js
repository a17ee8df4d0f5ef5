// What a page must not have, as lists that should be empty: the basics of what axe looks at, and a little more.
() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const rgb = (text) => text.match(/[\d.]+/g).map(Number);
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = (at) => {
    const own = rgb(getComputedStyle(at).backgroundColor);
    return own[3] === 0 ? ground(at.parentElement) : own;
  };
  const contrast = (at) => {
    const [more, less] = [light(rgb(getComputedStyle(at).color)), light(ground(at))].sort((a, b) => b - a);
    return (more + 0.05) / (less + 0.05);
  };
  const name = (at) => at.labels?.length || at.getAttribute("aria-label") || at.textContent.trim();
  const levels = all("h1, h2, h3").map((at) => Number(at.tagName[1]));
  const written = "h1, h2, h3, p, th, td, dt, dd, summary, label, button, small, .mark, .watch, .up, .down";
  return {
    pale: all(written)
      .filter((at) => at.checkVisibility() && at.textContent.trim() && !at.disabled && contrast(at) < 4.5)
      .map((at) => `${at.tagName} ${at.className}: ${contrast(at).toFixed(2)}`),
    unnamed: all("input, select, textarea, button, summary, [role=img], [role=group], section")
      .filter((at) => at.checkVisibility() && !name(at))
      .map((at) => at.outerHTML),
    lost: ["aria-controls", "aria-labelledby", "aria-describedby", "for"]
      .flatMap((kind) => all(`[${kind}]`).flatMap((at) => at.getAttribute(kind).split(" ")))
      .filter((id) => document.querySelectorAll(`[id="${id}"]`).length !== 1),
    jumps: levels.filter((level, place) => level > (levels[place - 1] ?? 0) + 1),
    unordered: all("[tabindex]").filter((at) => at.tabIndex > 0).map((at) => at.outerHTML),
    moving: all("*").filter((at) => parseFloat(getComputedStyle(at).transitionDuration) > 0).map((at) => at.className),
  };
}
