// Every table of the page, and so every figure, as a CSV file: made here, from what the page shows.
"use strict";

/** A field as RFC 4180 has it; what a spreadsheet would take for a formula is made text. */
function csvField(text) {
  const number = /^[-+−]?[\d.,]+(e[-+]?\d+)?%?$/.test(text);
  const inert = !number && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text.replace(/^−/, number ? "-" : "−");
  return /[",\n\r]/.test(inert) ? `"${inert.replaceAll('"', '""')}"` : inert;
}

function saveCsv(name, rows) {
  const lines = [];
  for (const row of rows) lines.push(row.map(csvField).join(","));
  const file = new Blob([lines.join("\r\n"), "\r\n"], { type: "text/csv;charset=utf-8" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = `${name}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** What a cell says: its number in full where the page has it, else its text without marks. */
function cellText(cell) {
  const numbers = [...cell.querySelectorAll("data")].map((one) => one.value);
  if (numbers.length) return numbers.join(" ");
  const copy = cell.cloneNode(true);
  copy.querySelectorAll(".mark, .unseen, svg, button").forEach((one) => one.remove());
  return copy.textContent.replace(/\s+/g, " ").trim();
}

function* tableRows(table) {
  for (const row of table.rows) yield [...row.cells].map(cellText);
}

for (const table of document.querySelectorAll("table[data-name]")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "save";
  button.textContent = "CSV";
  button.setAttribute("aria-label", `Save as CSV: ${table.caption.textContent.trim()}`);
  button.addEventListener("click", () => saveCsv(table.dataset.name, tableRows(table)));
  table.caption.append(" ", button);
}
