// The heat map with every candidate: sorted, searched, linked to, walked by key. Without it the table above it
// stands as it was written. Text of strangers reaches the page as text nodes alone.
"use strict";

const WHOLE = 500; // rows up to which all are in the page; beyond, only those in view
const MARGIN = 30; // rows kept above and below the view
const NONE = 2; // codes below are no value, and sort last

/** Reads the packed columns; ray_auditor/report/columns.py writes them. */
async function unpack(text) {
  const packed = atob(text);
  const bytes = new Uint8Array(packed.length);
  for (let at = 0; at < packed.length; at++) bytes[at] = packed.charCodeAt(at);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  const headBytes = new DataView(raw.buffer).getUint32(0, true);
  const utf8 = new TextDecoder();
  const head = JSON.parse(utf8.decode(raw.subarray(4, 4 + headBytes)));
  let at = 4 + headBytes;
  const ids = head.rows ? utf8.decode(raw.subarray(at, at + head.idBytes)).split("\n") : [];
  at += head.idBytes;
  const columns = new Map();
  for (const column of head.columns) {
    const codes = new Uint32Array(head.rows);
    for (let byte = 0; byte < column.width; byte++)
      for (let row = 0; row < head.rows; row++) codes[row] |= raw[at++] << (8 * byte);
    const { texts, shades } = column.like === undefined ? column : head.columns[column.like];
    columns.set(column.key, { texts, shades, codes });
  }
  return { ids, lower: ids.map((id) => id.toLowerCase()), columns, places: head.places, anchors: head.anchors };
}

function make(tag, attributes = {}, ...inside) {
  const one = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) one.setAttribute(name, value);
  one.append(...inside);
  return one;
}

class HeatMap {
  constructor(region, data) {
    this.region = region;
    this.data = data;
    this.table = region.querySelector("table");
    this.heads = [...this.table.querySelectorAll("thead th[data-key]")];
    this.names = this.heads.map((one) => one.innerText.replace(/\s+/g, " ").trim());
    this.keys = this.heads.map((one) => one.dataset.key);
    // In an address a suite has its name: its number follows from the clustering of one sweep.
    this.sorts = this.keys.map((key, at) => (key.startsWith("z ") ? `z ${this.names[at]}` : key));
    this.current = 0; // place in the view of the row that the keys move
    this.makeControls();
    this.makeHeads();
    this.table.querySelectorAll("tbody").forEach((one) => one.remove());
    this.table.caption.firstElementChild.textContent =
      "z by candidate and suite; a heading sorts, arrow keys walk the rows";
    this.body = this.table.appendChild(make("tbody"));
    region.addEventListener("scroll", () => requestAnimationFrame(() => this.draw()), { passive: true });
    this.body.addEventListener("keydown", (event) => this.walk(event));
    this.body.addEventListener("focusin", (event) => this.stand(event));
    addEventListener("hashchange", () => this.follow());
    this.follow(true);
  }

  text(key, row) {
    const { texts, codes } = this.data.columns.get(key);
    return texts[codes[row]];
  }

  makeControls() {
    const bar = make("div", { class: "controls", role: "search", "aria-label": "Candidates of the heat map" });
    const labelled = (name, control) => bar.append(make("label", {}, name, control)) || control;
    this.find = labelled("Name holds", make("input", { type: "search", autocomplete: "off", spellcheck: "false" }));
    const choice = (key, name, title) => {
      const column = this.data.columns.get(key);
      const seen = [...new Set(column.codes)].sort((a, b) => a - b).map((code) => column.texts[code]);
      if (seen.length < 2) return null;
      const options = seen.map((text) => make("option", { value: text }, text === "–" ? `no ${title}` : text));
      const select = make("select", { "data-key": key }, make("option", { value: "" }, "all"), ...options);
      return labelled(name, select);
    };
    this.choices = [
      choice("status", "Status", "status"),
      choice("why", "Since the last sweep", "record"),
      choice("suite", "Strays most on", "suite"),
    ].filter(Boolean);
    if (this.data.places.length > 2) {
      this.alike = make("button", { type: "button", "aria-pressed": "false" }, "Alike side by side");
      this.alike.addEventListener("click", () => this.sort(this.order === "alike" ? "" : "alike"));
      bar.append(this.alike);
    }
    const save = make("button", { type: "button" }, "Save these rows as CSV");
    save.addEventListener("click", () => saveCsv("candidates", this.rows()));
    bar.append(save);
    this.count = make("p", { class: "note", role: "status" });
    this.region.before(bar, this.count);
    this.find.addEventListener("input", () => this.change());
    this.choices.forEach((one) => one.addEventListener("change", () => this.change()));
  }

  makeHeads() {
    this.heads.forEach((head, at) => {
      const button = make("button", { type: "button" });
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => this.sort(this.keys[at]));
    });
  }

  /** First click: what strays most, or A to Z; second: the other way. */
  sort(key) {
    this.falling = key === this.order ? !this.falling : !["id", "p", "q"].includes(key);
    this.order = key;
    this.change();
  }

  change() {
    const said = new URLSearchParams();
    if (this.find.value) said.set("find", this.find.value);
    for (const one of this.choices) if (one.value) said.set(one.dataset.key, one.value);
    if (this.order) said.set("sort", (this.falling ? "-" : "") + (this.sorts[this.keys.indexOf(this.order)] ?? this.order));
    history.replaceState(null, "", said.size ? `#${said}` : "#map");
    this.current = 0;
    this.select();
    this.region.scrollTop = 0;
  }

  /** Does what the address says: `#candidate=ID`, `#find=TEXT&status=flagged&sort=-score`. */
  follow(first = false) {
    const hash = location.hash.slice(1);
    if (!first && !hash.includes("=")) return;
    const said = new URLSearchParams(hash.includes("=") ? hash : "");
    this.find.value = said.get("find") ?? "";
    for (const one of this.choices) one.value = said.get(one.dataset.key) ?? "";
    const key = said.get("sort") ?? "";
    this.falling = key.startsWith("-");
    const order = key.replace(/^-/, "");
    this.order = order === "alike" ? order : (this.keys[this.sorts.indexOf(order)] ?? "");
    this.select();
    const row = this.data.ids.indexOf(said.get("candidate") ?? "");
    const at = row < 0 ? -1 : this.view.indexOf(row);
    if (said.size) this.region.scrollIntoView();
    if (at >= 0) this.go(at);
    else if (said.has("candidate")) this.count.textContent = "The candidate of this address is not in this page.";
  }

  /** The rows that pass, in order. */
  select() {
    const { ids, lower, columns, places } = this.data;
    const wanted = this.find.value.toLowerCase();
    const tests = this.choices.filter((one) => one.value).map((one) => {
      const { texts, codes } = columns.get(one.dataset.key);
      return [codes, texts.indexOf(one.value)];
    });
    let view = [];
    for (let row = 0; row < ids.length; row++)
      if (lower[row].includes(wanted) && tests.every(([codes, code]) => codes[row] === code)) view.push(row);
    if (this.order === "alike") {
      const place = new Map(places.map((row, at) => [row, at]));
      const at = (row) => place.get(row) ?? places.length + row;
      view.sort((a, b) => at(a) - at(b));
    } else if (this.order === "id") {
      view.sort((a, b) => (lower[a] < lower[b] ? -1 : lower[a] > lower[b] ? 1 : a - b));
      if (this.falling) view.reverse();
    } else if (this.order) {
      const { codes } = columns.get(this.order);
      const sign = this.falling ? -1 : 1;
      const none = (row) => codes[row] < NONE;
      view.sort((a, b) => none(a) - none(b) || sign * (codes[a] - codes[b]) || a - b);
    }
    this.view = view;
    const said = (number) => number.toLocaleString("en");
    const more = this.region.dataset.total - ids.length;
    this.count.textContent =
      `${said(view.length)} of ${said(ids.length)} candidates` +
      (more > 0 ? `; ${said(more)} more are in summary.json alone` : "");
    this.alike?.setAttribute("aria-pressed", String(this.order === "alike"));
    this.heads.forEach((head, at) => {
      if (this.keys[at] === this.order) head.setAttribute("aria-sort", this.falling ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    this.table.setAttribute("aria-rowcount", String(view.length + 1));
    this.region.classList.toggle("tall", view.length > WHOLE);
    this.drawn = "";
    this.draw();
  }

  draw() {
    const total = this.view.length;
    let [first, stop] = [0, total];
    if (total > WHOLE) {
      this.height ??= this.measure();
      const top = Math.floor(this.region.scrollTop / this.height);
      first = Math.max(0, top - MARGIN);
      stop = Math.min(total, top + Math.ceil(this.region.clientHeight / this.height) + MARGIN);
    }
    if (this.drawn === `${first} ${stop}`) return;
    this.drawn = `${first} ${stop}`;
    const focused = this.body.contains(document.activeElement);
    const rows = [];
    if (first) rows.push(this.space(first));
    for (let at = first; at < stop; at++) rows.push(this.row(at));
    if (stop < total) rows.push(this.space(total - stop));
    this.body.replaceChildren(...rows);
    if (focused) this.body.querySelector(`tr[data-at="${this.current}"]`)?.focus({ preventScroll: true });
  }

  measure() {
    this.body.replaceChildren(this.row(0));
    return this.body.firstElementChild.getBoundingClientRect().height;
  }

  space(rows) {
    const cell = make("td", { colspan: String(this.keys.length) });
    cell.style.height = `${rows * this.height}px`;
    return make("tr", { "aria-hidden": "true", class: "space" }, cell);
  }

  row(at) {
    const row = this.view[at];
    const id = this.data.ids[row];
    const status = this.text("status", row);
    const anchor = this.data.anchors[row];
    const name = make("bdi", {}, id);
    const head = make("th", { scope: "row", title: id }, anchor ? make("a", { href: `#${anchor}` }, name) : name);
    if (status === "flagged") head.prepend(...mark());
    const line = make("tr", { "aria-rowindex": String(at + 2), tabindex: at === this.current ? "0" : "-1" }, head);
    line.dataset.candidate = id;
    line.dataset.at = at;
    if (!["flagged", "ok"].includes(status)) {
      const words = `not audited: ${status}; ${this.text("reason", row)}`;
      line.append(make("td", { class: "no-result", colspan: String(this.keys.length - 1) }, make("span", {}, words)));
      return line;
    }
    const marks = this.text("marks", row).split(" ");
    for (const key of this.keys.slice(1)) {
      const { texts, shades, codes } = this.data.columns.get(key);
      const text = texts[codes[row]];
      const flagged = key.startsWith("z ") && marks.includes(key.slice(2));
      const kind = shades.length ? `z ${shades[codes[row]]}${flagged ? " flagged" : ""}` : key;
      const shown = text === "n.d." ? make("abbr", { title: "not determined" }, text) : text;
      line.append(make("td", { class: `num ${kind}` }, ...(flagged ? mark() : []), shown));
    }
    return line;
  }

  stand(event) {
    const line = event.target.closest("tr[data-at]");
    if (!line) return;
    this.body.querySelector("tr[tabindex='0']")?.setAttribute("tabindex", "-1");
    line.setAttribute("tabindex", "0");
    this.current = Number(line.dataset.at);
  }

  walk(event) {
    const page = Math.max(1, Math.floor(this.region.clientHeight / (this.height ?? 28)) - 2);
    const last = this.view.length - 1;
    const to = {
      ArrowDown: this.current + 1, ArrowUp: this.current - 1, Home: 0, End: last,
      PageDown: this.current + page, PageUp: this.current - page,
    }[event.key];
    if (event.key === "Enter" && event.target.matches("tr")) {
      event.target.querySelector("a")?.click();
    }
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.go(Math.min(Math.max(to, 0), last));
    history.replaceState(null, "", this.address(this.current));
  }

  address(at) {
    return `#${new URLSearchParams({ candidate: this.data.ids[this.view[at]] })}`;
  }

  /** Shows and focuses a row. */
  go(at) {
    this.current = at;
    if (this.height && this.view.length > WHOLE) {
      const head = this.table.tHead.getBoundingClientRect().height + this.table.caption.getBoundingClientRect().height;
      const top = at * this.height;
      const room = this.region.clientHeight - head - 2 * this.height;
      if (top < this.region.scrollTop) this.region.scrollTop = top;
      else if (top > this.region.scrollTop + room) this.region.scrollTop = top - room;
      this.drawn = "";
      this.draw();
    }
    const line = this.body.querySelector(`tr[data-at="${at}"]`);
    line?.focus({ preventScroll: this.view.length > WHOLE });
  }

  *rows() {
    yield [...this.names, "status", "since the last sweep", "strays most on", "reason"];
    for (const row of this.view)
      yield [
        this.data.ids[row],
        ...[...this.keys.slice(1), "status", "why", "suite", "reason"].map((key) => this.text(key, row)),
      ];
  }
}

function mark() {
  const seen = make("span", { class: "mark", "aria-hidden": "true" }, "▲");
  return [seen, make("span", { class: "unseen" }, "flagged: ")];
}

async function start() {
  const block = document.getElementById("candidate-data");
  const region = document.querySelector("#map .scroll");
  if (!block || !region || !("DecompressionStream" in window)) return;
  const data = await unpack(block.textContent);
  if (data.ids.length) new HeatMap(region, data);
}

start();
