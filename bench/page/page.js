"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  /* Texts always become text nodes: nothing that a result says can become an element. */
  function make(name, props = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(props)) {
      if (key === "class") made.className = value;
      else made.setAttribute(key, value);
    }
    made.append(...children.filter((child) => child !== null && child !== ""));
    return made;
  }

  // Sorting

  function sortBy(button) {
    const heading = button.closest("th");
    const table = heading.closest("table");
    const place = [...heading.parentNode.children].indexOf(heading);
    const before = heading.getAttribute("aria-sort");
    const falling = before === "ascending" || (before === "none" && startsHigh(heading));
    all("thead th", table).forEach((th) => th.setAttribute("aria-sort", "none"));
    heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const numeric = heading.classList.contains("num");
    const rows = [...table.tBodies].map((body) => [orderOf(body, place, numeric), body]);
    rows.sort(([a], [b]) => compare(a, b, falling));
    table.append(...rows.map(([, body]) => body));
  }

  /* What is better when it is higher starts with the highest. */
  const startsHigh = (heading) => /[↑%]|P\(/.test(heading.textContent);

  function orderOf(body, place, numeric) {
    const said = body.rows[0].cells[place].dataset.o;
    return said === "" ? null : numeric ? Number(said) : said;
  }

  function compare(a, b, falling) {
    if (a === null || b === null) return (a === null) - (b === null);
    const order = typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
    return falling ? -order : order;
  }

  // Filtering

  const filter = document.getElementById("filter");
  const toggle = document.getElementById("controls");
  const LISTED = 60;
  const SMALL = 256;
  let listed = LISTED;

  const words = () => filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const holds = (text, wanted) => wanted.every((word) => text.includes(word));

  function applyFilter() {
    const wanted = words();
    const controls = toggle.getAttribute("aria-pressed") === "true";
    let shown = 0;
    for (const board of all("article.board")) {
      let left = 0;
      for (const body of all("tbody", board)) {
        body.hidden = (!controls && body.classList.contains("control")) || !holds(textOf(body, board), wanted);
        if (!body.hidden && body.parentNode.classList.contains("main")) left += 1;
      }
      board.hidden = left === 0;
      shown += left;
    }
    for (const part of all("section.question, section.track:not(#all-cells)")) {
      part.hidden = !all("article.board", part).some((board) => !board.hidden);
    }
    listed = LISTED;
    listCells();
    document.getElementById("count").textContent = wanted.length || !controls ? `${shown} rows` : "";
  }

  function textOf(body, board) {
    body.words ??= `${board.dataset.words} ${body.rows[0].textContent}`.toLowerCase();
    return body.words;
  }

  // Cells

  const short = (value) => (value === null || value === undefined ? "–" : String(Number(value.toPrecision(4))));
  const titleOf = (cell) => `${cell.defense} · ${cell.attack} · ${purified(cell)}${cell.model} · seed ${cell.seed}`;
  const purified = (cell) => (cell.purifier === "none" ? "" : `${cell.purifier} · `);

  function unfold(button) {
    const body = button.closest("tbody");
    const open = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!open));
    if (open) {
      body.rows[1].remove();
      return;
    }
    const found = button.dataset.cells.split(" ").filter(Boolean).map((place) => data.cells[Number(place)]);
    const panel = make("div", { class: "panel" }, ...cellList(found));
    const row = make("tr", { class: "detail" }, make("td", { colspan: body.rows[0].cells.length }, panel));
    body.append(row);
  }

  /* Of many cells the first with pictures is open. */
  function cellList(found) {
    if (!found.length) return [make("p", { class: "note" }, "No cell of this line is on the page.")];
    const first = found.find((cell) => (cell.images ?? []).some((image) => image.src)) ?? found[0];
    return found.map((cell) => folded(cell, cell === first));
  }

  function folded(cell, open) {
    const mark = cell.status === "ok" ? "" : make("span", { class: "chip" }, cell.status);
    const pictures = (cell.images ?? []).some((image) => image.src) ? make("span", { class: "sub" }, "pictures") : "";
    const box = make("details", { class: "cell" }, make("summary", {}, titleOf(cell), " ", mark, " ", pictures));
    const fill = () => {
      if (box.open && box.children.length === 1) box.append(cellView(cell));
    };
    box.addEventListener("toggle", fill);
    box.open = open;
    fill();
    return box;
  }

  function cellView(cell) {
    const view = make("div", { class: "view" }, strips(cell));
    const said = [cell.reason, cell.error, ...(cell.warnings ?? [])].filter(Boolean);
    view.append(...said.map((text) => make("p", { class: "note" }, text)));
    const link = make("a", { href: cell.file }, "result.json");
    if (!cell.stages) {
      view.append(make("p", { class: "note" }, "The details of this cell were left out of the page: ", link));
      return view;
    }
    view.append(
      part("Provenance", provenance(cell, link)),
      part("Measurements", numbers(cell)),
      part("Stages", stages(cell)),
      part("Parameters", parameters(cell)),
    );
    return view;
  }

  const part = (title, content) => make("section", { class: "part" }, make("h5", {}, title), content);

  function strips(cell) {
    const images = cell.images ?? [];
    if (!images.length) return make("p", { class: "sub" }, "No pictures were kept of this cell.");
    return make("div", { class: "strips" }, ...images.map((image) => strip(image, cell)));
  }

  function strip(image, cell) {
    if (!image.src) {
      const name = image.link ? make("a", { href: image.link }, image.name) : image.name;
      return make("p", { class: "sub" }, name, `: ${image.why}`);
    }
    const shows = image.rows.length ? `top to bottom: ${image.rows.join(", ")}` : image.said || image.name;
    const times = image.width <= SMALL ? 2 : 1;
    const picture = make("img", { src: image.src, width: image.width * times, height: image.height * times,
      alt: `${cell.defense}, ${shows}`, decoding: "async", ...(times > 1 ? { class: "twice" } : {}) });
    const labels = make("ol", { class: "rows" }, ...image.rows.map((row) => make("li", {}, row)));
    const said = [image.name.replace(/\.png$/, ""), image.said].filter(Boolean).join(" · ");
    const frame = make("div", { class: "frame" }, image.rows.length ? labels : "", picture);
    return make("figure", { class: "strip" }, frame, make("figcaption", { class: "sub" }, said));
  }

  function provenance(cell, link) {
    const from = data.sources[cell.source] ?? {};
    const git = from.git ? `${from.git.commit}${from.git.dirty ? " (with uncommitted changes)" : ""}` : "not from a checkout";
    const versions = Object.entries(from.packages ?? {}).map(([name, version]) => `${name} ${version}`).join(", ");
    const digests = Object.entries(cell.digests ?? {}).filter(([, hash]) => hash);
    const seconds = cell.stages.reduce((sum, stage) => sum + stage[2], 0);
    return table([], [
      ["identity", code(cell.id)], ["record", link], ["seed", String(cell.seed)],
      ["protocol", said(data.protocols[cell.protocol])],
      ...digests.map(([name, hash]) => [`${name} digest`, code(hash)]),
      ["surrogate", cell.surrogate], ["stamp", cell.stamp],
      ["commit", code(git)], ["bench", from.bench], ["versions", versions],
      ["python", from.python], ["machine", [from.os, from.cpu, `${from.cores} cores`, ...(from.gpus ?? [])].join(", ")],
      ["started", cell.started], ["ended", cell.ended],
      ["cost", `${short(seconds)} s in ${cell.stages.length} stages`],
      ["options", (cell.overrides ?? []).join(" ")],
      ["samples", cell.rows ? `${cell.rows} rows, sha256 ${cell.samples}` : ""],
    ].filter(([, value]) => value));
  }

  const code = (text) => (text ? make("code", {}, text) : "");
  const said = (value) => Object.entries(value ?? {}).map(([k, v]) => `${k}=${JSON.stringify(v)}`).join(", ");

  function numbers(cell) {
    const arrows = new Map([[true, " ↑"], [false, " ↓"]]);
    const rows = (cell.numbers ?? []).map(([place, value, low, high, n, units, reason]) => {
      const what = data.measures[place];
      const name = `${what.name}${arrows.get(what.better) ?? ""}`;
      const interval = low === null || low === undefined ? "" : `[${short(low)}, ${short(high)}]`;
      const unit = what.unit ? make("span", { class: "sub" }, ` ${what.unit}`) : "";
      const shown = value === null ? make("span", { class: "sub" }, reason) : short(value);
      return [make("span", {}, name, unit), shown, interval, units ? `${n} of ${units}` : String(n), code(what.hash)];
    });
    return rows.length ? table(["measurement", "value", "95 % interval", "n of units", "protocol hash"], rows) : "none";
  }

  function stages(cell) {
    const rows = cell.stages.map(([stage, key, seconds, peak, device, reused]) => [
      stage, code(key), short(seconds), peak === null ? "–" : short(peak), device, reused ? "reused" : "built"]);
    return rows.length ? table(["stage", "key", "seconds", "peak MB", "device", "in this run"], rows) : "none ran";
  }

  function parameters(cell) {
    const rows = (cell.plugins ?? []).map((place) => {
      const one = data.plugins[place];
      const told = [said(one.parameters), one.changed.length ? `not default: ${one.changed.join(", ")}` : "",
        one.summary, one.paper, one.official_code].filter(Boolean);
      const name = make("p", {}, make("strong", {}, one.label), ` version ${one.version}`);
      return [one.kind, make("div", {}, name, ...told.map((text) => make("p", { class: "sub" }, text)))];
    });
    return table([], rows);
  }

  function table(head, rows) {
    const line = (row) => make("tr", {}, ...row.map((value, i) => make(i ? "td" : "th", i ? {} : { scope: "row" }, value ?? "")));
    const made = make("table", { class: head.length ? "plain lined" : "plain" });
    if (head.length) made.append(make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)))));
    made.append(make("tbody", {}, ...rows.map(line)));
    return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "table" }, made);
  }

  function listCells() {
    const wanted = words();
    const found = data.cells.filter((cell) => holds(`${cell.track} ${titleOf(cell)} ${cell.status} ${cell.id}`.toLowerCase(), wanted));
    const list = document.getElementById("cells-list");
    list.replaceChildren(...found.slice(0, listed).map((cell) => make("li", {}, folded(cell, false))));
    const more = document.getElementById("more-cells");
    more.hidden = found.length <= listed;
    more.textContent = `Show more (${found.length - listed} left)`;
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.classList.contains("sort")) sortBy(button);
    if (button.classList.contains("open")) unfold(button);
    if (button === toggle) {
      toggle.setAttribute("aria-pressed", String(toggle.getAttribute("aria-pressed") !== "true"));
      applyFilter();
    }
    if (button.id === "more-cells") {
      listed += LISTED;
      listCells();
    }
  });
  filter.addEventListener("input", applyFilter);
  listCells();
})();
