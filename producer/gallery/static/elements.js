// Small functions that all parts use, of the gallery and of the server's page.
// Text is set as text, never as markup: the page's Content-Security-Policy forbids markup from text.

const $ = (id) => document.getElementById(id);
const make = (tag, name, text) => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
};
const format = new Intl.NumberFormat("en");
const many = (count, one) => `${format.format(count)} ${one}${count === 1 ? "" : "s"}`;
const when = (seconds) =>
  new Date(seconds * 1000).toLocaleString("en-GB", { dateStyle: "long", timeStyle: "short" });
const whenIdle = (work) => (window.requestIdleCallback ?? setTimeout)(work);

/** Fields with a place of their own in the viewer; the others are listed. */
const TEXTS = new Set(["prompt", "negative_prompt"]);

$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
