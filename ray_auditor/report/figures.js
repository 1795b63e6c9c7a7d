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
  const number = cell.querySelector("data, abbr");
  if (number) return number.value ?? "";
  const copy = cell.cloneNode(true);
  copy.querySelectorAll(".mark, .unseen, svg, button").forEach((one) => one.remove());
  return copy.textContent.replace(/\s+/g, " ").trim();
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
      const numbers = [...cell.querySelectorAll("data, abbr")].map((one) => one.value ?? "");
      return parts[at].map((_, part) => numbers[part] ?? "");
    });
    yield ruled ? [...fields, isHead ? "Rule" : row.parentElement.dataset.rule] : fields;
  }
}

function saveButton(table, text) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "save";
  button.textContent = text;
  button.setAttribute("aria-label", `${text}: ${table.caption.textContent.trim()}`);
  button.addEventListener("click", () => saveCsv(table.dataset.name, tableRows(table)));
  return button;
}

for (const table of document.querySelectorAll("table[data-name]")) table.caption.append(" ", saveButton(table, "CSV"));
for (const figure of document.querySelectorAll("[data-csv]")) {
  const table = document.querySelector(`table[data-name="${figure.dataset.csv}"]`);
  if (table) figure.append(saveButton(table, figure.dataset.text ?? "The figure's data as CSV"));
}
