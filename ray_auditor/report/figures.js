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
  link.download = `${name.replace(/[^\p{L}\p{N}.,-]+/gu, "_").slice(0, 150)}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** What a cell says: its number in full where the page has it, else its text without marks. */
function cellText(cell) {
  const number = cell.querySelector("data, abbr");
  if (number) return number.value ?? "";
  const copy = cell.cloneNode(true);
  copy.querySelectorAll(".mark, .unseen, svg, button").forEach((one) => one.remove());
  return copy.textContent.replace(/\s+/g, " ").trim();
}

/** What one part of a cell says: a number in full, a text as it stands. */
function partText(one) {
  return one.matches(".part") ? one.textContent.replace(/\s+/g, " ").trim() : (one.value ?? "");
}

/** The rows of a table; a column whose heading names parts is as many fields, and none where it only draws. */
function* tableRows(table) {
  const parts = [...table.tHead.rows[0].cells].map((one) => one.dataset.parts?.split("|").filter(Boolean));
  const ruled = table.querySelector("tbody[data-rule]") !== null;
  for (const row of table.rows) {
    if (row.matches(".rule-row")) continue;
    const isHead = row.parentElement === table.tHead;
    const fields = [...row.cells].flatMap((cell, at) => {
      if (!parts[at]) return [cellText(cell)];
      if (isHead) return parts[at];
      const values = [...cell.querySelectorAll("data, abbr, .part")].map(partText);
      return parts[at].map((_, part) => values[part] ?? "");
    });
    if (ruled) fields.push(isHead ? "Rule" : row.parentElement.dataset.rule);
    if (table.dataset.of !== undefined) fields.unshift(isHead ? "Candidate" : table.dataset.of);
    yield fields;
  }
}

function saveButton(table, text) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "save";
  button.textContent = text;
  button.setAttribute("aria-label", `${text}: ${table.caption.textContent.trim()}`);
  button.addEventListener("click", () => saveCsv([table.dataset.of, table.dataset.name].filter(Boolean).join(" "), tableRows(table)));
  return button;
}

for (const table of document.querySelectorAll("table[data-name]")) table.caption.append(" ", saveButton(table, "CSV"));
for (const figure of document.querySelectorAll("[data-csv]")) {
  const table = document.querySelector(`table[data-name="${figure.dataset.csv}"]`);
  if (table) figure.append(saveButton(table, figure.dataset.text ?? "The figure's data as CSV"));
}
