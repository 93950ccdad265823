"use strict";

// ---- sorting: the blocks of a table (tbody), each a row with its lines

function sortKey(block, column) {
  const lines = [...block.rows];
  const ours = lines.filter((line) => line.dataset.kind === "last");
  const cell = [...ours, ...lines].map((line) => line.cells[column]).find((one) => one?.textContent.trim());
  if (!cell) return null;
  const text = cell.textContent.trim();
  return cell.classList.contains("number") ? parseFloat(text.replace(/,(?=\d)/g, "")) : text.toLowerCase();
}

function compare(a, b) {
  if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
  return typeof a === "number" ? -1 : 1;
}

function sortTable(button) {
  const head = button.closest("th");
  const table = head.closest("table");
  const first = head.classList.contains("number") ? "descending" : "ascending";
  const before = head.getAttribute("aria-sort");
  const after = before === null ? first : before === "ascending" ? "descending" : "ascending";
  const sign = after === "ascending" ? 1 : -1;
  for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", after);
  const blocks = [...table.tBodies].map((block, i) => ({ block, i, key: sortKey(block, head.cellIndex) }));
  blocks.sort((a, b) => {
    if (a.key === null || b.key === null) return (a.key === null) - (b.key === null) || a.i - b.i;
    return sign * compare(a.key, b.key) || a.i - b.i;
  });
  table.append(...blocks.map((one) => one.block));
}

// ---- filters: all words of the text, and the choices beside it

function filterTable(tools) {
  const table = document.getElementById(tools.dataset.table);
  const words = tools.querySelector("input[type=search]").value.toLowerCase().split(/\s+/);
  const choices = [...tools.querySelectorAll("select")].filter((one) => one.value !== "");
  const isRunOnly = tools.querySelector("input[type=checkbox]")?.checked;
  const shown = [];
  let count = 0;
  for (const block of table.tBodies) {
    const text = block.textContent.toLowerCase();
    block.hidden = !(
      words.every((word) => text.includes(word)) &&
      choices.every((one) => block.dataset[one.name] === one.value) &&
      (!isRunOnly || block.dataset.run === "1")
    );
    if (block.hidden) continue;
    count += 1;
    shown.push(...block.rows);
  }
  tools.querySelector(".count").textContent = `${count} of ${table.tBodies.length} rows`;
  hideEmptyColumns(table, shown);
}

function hideEmptyColumns(table, shown) {
  for (const head of table.tHead.rows[0].cells) {
    const at = head.cellIndex;
    const isEmpty = shown.length > 0 && shown.every((row) => !row.cells[at].textContent.trim());
    if (head.hidden === isEmpty) continue;
    for (const row of table.rows) row.cells[at].hidden = isEmpty;
  }
}

// ---- plots: drawn when they come into view, since a phone has little memory

async function unpack() {
  const packed = atob(document.getElementById("plotly").textContent);
  const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

async function draw(box) {
  if (box.dataset.drawn) return;
  box.dataset.drawn = "1";
  await loaded;
  const { data, layout } = JSON.parse(box.querySelector("script").textContent);
  let width = null;
  const fit = () => {
    if (box.clientWidth === width) return;
    width = box.clientWidth;
    Plotly.react(box, data, layoutOf(width, data, layout), { displayModeBar: false });
  };
  fit();
  new ResizeObserver(fit).observe(box);
}

function layoutOf(width, data, layout) {
  const isNarrow = width < 480;
  const below = { orientation: "h", yref: "container", y: 0, yanchor: "bottom", xref: "container", x: 0 };
  return {
    ...layout,
    width,
    height: 360 + (isNarrow ? 20 * data.length : 0),
    margin: { l: 50, r: 10, t: 10, b: 45 },
    font: { family: getComputedStyle(document.body).fontFamily, size: 12 },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    hovermode: "closest",
    hoverlabel: { align: "left" },
    showlegend: true,
    legend: isNarrow ? below : {},
  };
}

// ---- a link to a row opens it

function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  if (target) target.scrollIntoView();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("th button");
  if (button) sortTable(button);
});
for (const tools of document.querySelectorAll(".tools")) {
  tools.addEventListener("input", () => filterTable(tools));
  filterTable(tools);
}
const loaded = unpack(); // at once: what is printed has to be drawn without waiting
const boxes = document.querySelectorAll(".plot");
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
}, { rootMargin: "400px" });
for (const box of boxes) observer.observe(box);
window.addEventListener("beforeprint", () => boxes.forEach(draw));
window.addEventListener("hashchange", openTarget);
openTarget();
