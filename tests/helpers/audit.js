// Accessibility violations of the page, as lists that should be empty: the basics of axe, and a little more.
() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const rgb = (text) => text.match(/[\d.]+/g).map(Number);
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const background = (element) => {
    const color = rgb(getComputedStyle(element).backgroundColor);
    return color[3] === 0 ? background(element.parentElement) : color;
  };
  const contrast = (element) => {
    const colors = [rgb(getComputedStyle(element).color), background(element)];
    const [lighter, darker] = colors.map(luminance).sort((a, b) => b - a);
    return (lighter + 0.05) / (darker + 0.05);
  };
  const name = (element) => element.labels?.length || element.getAttribute("aria-label") || element.textContent.trim();
  const levels = all("h1, h2, h3").map((heading) => Number(heading.tagName[1]));
  const text = "h1, h2, h3, p, th, td, dt, dd, summary, label, button, small, .mark, .watch, .up, .down";
  const isRendered = (element) => element.checkVisibility() && element.textContent.trim() && !element.disabled;
  return {
    lowContrast: all(text)
      .filter((element) => isRendered(element) && contrast(element) < 4.5)
      .map((element) => `${element.tagName} ${element.className}: ${contrast(element).toFixed(2)}`),
    unnamed: all("input, select, textarea, button, summary, [role=img], [role=group], section")
      .filter((element) => element.checkVisibility() && !name(element))
      .map((element) => element.outerHTML),
    brokenReferences: ["aria-controls", "aria-labelledby", "aria-describedby", "for"]
      .flatMap((kind) => all(`[${kind}]`).flatMap((element) => element.getAttribute(kind).split(" ")))
      .filter((id) => document.querySelectorAll(`[id="${id}"]`).length !== 1),
    skippedLevels: levels.filter((level, index) => level > (levels[index - 1] ?? 0) + 1),
    positiveTabIndex: all("[tabindex]")
      .filter((element) => element.tabIndex > 0)
      .map((element) => element.outerHTML),
    transitions: all("*")
      .filter((element) => parseFloat(getComputedStyle(element).transitionDuration) > 0)
      .map((element) => element.className),
  };
}
