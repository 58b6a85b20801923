"use strict";
// Narrows the cards to those that have all words. The filters need no script: see report.css.
const hiddenBy = { "all": [], "wrong-at-1": ["r1"], "wrong-at-5": ["r1", "r5"] };
const cards = [...document.querySelectorAll("article")].map(card => ({
  card, text: card.textContent, way: card.parentNode, level: card.className,
}));
const words = document.querySelector("#narrow input");
const count = document.querySelector("output");

function narrow() {
  const patterns = words.value.split(/\s+/).filter(Boolean).map(word => new RegExp(
    (/^\w/.test(word) ? "\\b" : "") + word.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"), "i"));
  for (const entry of cards) {
    entry.card.hidden = !patterns.every(pattern => pattern.test(entry.text));
  }
  tell();
}

function tell() {
  const [way, which] = [...document.querySelectorAll("input:checked")].map(input => input.id);
  const own = cards.filter(({ way: section }) => section.classList.contains(way));
  const left = own.filter(({ card, level }) => !card.hidden && !hiddenBy[which].includes(level));
  const { queries } = document.querySelector(`section.${way}`).dataset;
  count.textContent = `${left.length.toLocaleString("en")} of ${queries} queries shown`;
}

document.getElementById("narrow").hidden = false;
words.addEventListener("input", narrow);
document.querySelector("form").addEventListener("change", tell);
document.querySelector("form").addEventListener("submit", event => event.preventDefault());
narrow();
