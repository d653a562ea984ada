"use strict";
// The report's page: draws clusters into the charts, links charts, map and gallery, and keeps the state in the URL's hash.
// All text from the catalog goes through textContent, never through markup.
(() => {
  const STEP = innerWidth < 768 ? 6 : 12; // cards that are added at a time
  const MANY = 5000; // clusters, above which dots are small
  const byId = (id) => document.getElementById(id);

  // --- data: blocks in the page, or scripts beside it -------------------------------------------------------------------

  const loaded = new Map();
  const waiting = new Map();
  window.tailwiseData = (name, value) => waiting.get(name)(value);
  function load(name) {
    if (!loaded.has(name)) {
      const block = byId(`data-${name}`);
      loaded.set(name, block ? Promise.resolve(JSON.parse(block.textContent)) : new Promise((resolve, reject) => {
        waiting.set(name, resolve);
        const script = document.createElement("script");
        script.src = `data/${name}.js`;
        script.onerror = () => reject(new Error(`data/${name}.js is missing: copy the whole folder of the report`));
        document.head.append(script);
      }));
    }
    return loaded.get(name);
  }
  const meta = JSON.parse(byId("data-meta").textContent);
  const columns = {};
  for (const [name, [kind, text]] of Object.entries(meta.columns)) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    columns[name] = kind === "f4" ? new Float32Array(bytes.buffer) : new Int32Array(bytes.buffer);
  }
  const count = meta.clusters;
  const plans = meta.plans;

  // --- small helpers ----------------------------------------------------------------------------------------------------

  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name in element && name !== "list") element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }
  const number = (value, digits = 3) => Number.isFinite(value)
    ? (Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(digits)))).replace("-", "−") : "–";
  const fixed = (value, digits) => Number.isFinite(value) ? value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", "−") : "–";
  const nameOf = (cluster) => meta.values ? meta.values[cluster] ?? "no value" : `cluster ${cluster}`;
  const planNumber = (name) => Math.max(0, plans.findIndex((plan) => plan.name === name));

  // --- state, which the URL's hash holds --------------------------------------------------------------------------------

  const fields = [];
  if (plans.length) fields.push(["rate", "rate in the plan", "how often an epoch draws each sample of the cluster, on average"]);
  fields.push(["size", "size", "samples in the cluster"]);
  if (columns.complexity) fields.push(["complexity", "complexity", "spread × distance to the other centroids"], ["d_intra", "spread", "mean distance of the samples to their centroid"]);
  const start = {
    plan: plans[0]?.name ?? "", versus: plans[1]?.name ?? "", color: fields[0][0], sort: "size", up: "", q: "", brush: "", cluster: "", sample: "",
  };
  const state = { ...start };
  function readHash() {
    const given = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
    for (const key of Object.keys(start)) state[key] = given.get(key) ?? start[key];
    if (!plans.some((plan) => plan.name === state.plan)) state.plan = start.plan;
    if (!plans.some((plan) => plan.name === state.versus)) state.versus = start.versus;
    if (!fields.some(([key]) => key === state.sort)) state.sort = start.sort;
    if (state.color.startsWith("group:") ? !(state.color in columns) : !fields.some(([key]) => key === state.color)) state.color = start.color;
    if (!(Number.isInteger(Number(state.cluster)) && Number(state.cluster) >= 0 && Number(state.cluster) < count)) state.cluster = "";
    if (!Object.hasOwn(meta.charts, state.brush.split(",")[0])) state.brush = "";
  }
  function writeHash() {
    const given = new URLSearchParams();
    for (const key of Object.keys(start)) if (state[key] !== start[key]) given.set(key, state[key]);
    const text = given.toString();
    if (text) history.replaceState(null, "", `#${text}`);
    else if (location.hash.includes("=")) history.replaceState(null, "", location.pathname + location.search);
  }
  function column(name) {
    if (name === "quota" || name === "rate") return columns[`${name}:${planNumber(state.plan)}`];
    if (name === "versus") return columns[`rate:${planNumber(state.versus)}`];
    return columns[name];
  }

  // --- selection: a brushed rectangle, one cluster, and words ---------------------------------------------------------------

  let selected = null; // Uint8Array [K], null for all
  function select() {
    const brush = state.brush ? state.brush.split(",") : null;
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    if (!brush && state.cluster === "" && !words.length) { selected = null; return; }
    selected = new Uint8Array(count).fill(1);
    if (state.cluster !== "") { selected.fill(0); selected[Number(state.cluster)] = 1; }
    const chart = brush && meta.scatter[brush[0]];
    if (chart) {
      const [x, y] = [column(chart[0]), column(chart[1])];
      const [left, right, low, high] = brush.slice(1).map(Number);
      for (let at = 0; at < count; at++) if (!(x[at] >= left && x[at] <= right && y[at] >= low && y[at] <= high)) selected[at] = 0;
    }
    for (const word of words) for (let at = 0; at < count; at++) {
      if (selected[at] && !(meta.words[at].includes(word) || nameOf(at).toLowerCase().includes(word))) selected[at] = 0;
    }
  }

  // --- colours ----------------------------------------------------------------------------------------------------------

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const RAMPS = [ // from dark to light, so that their order shows without colours; light and dark page
    [[82, 40, 150], [50, 88, 180], [20, 128, 150], [40, 150, 95], [128, 160, 30], [214, 150, 10]],
    [[150, 115, 225], [90, 140, 230], [45, 170, 185], [80, 195, 125], [170, 208, 70], [248, 212, 80]],
  ];
  const ramp = (share) => {
    const steps = RAMPS[Number(dark.matches)], place = Math.min(Math.max(share, 0), 1) * (steps.length - 1), low = Math.min(Math.floor(place), steps.length - 2), rest = place - low;
    return steps[low].map((value, at) => Math.round(value + rest * (steps[low + 1][at] - value)));
  };
  const GROUPS = [[61, 124, 201], [204, 96, 20], [40, 150, 110], [160, 92, 194], [176, 132, 0], [0, 150, 175], [208, 77, 120], [150, 104, 66]];
  let colors = new Uint32Array(0);
  const packed = ([red, green, blue]) => (blue << 16 | green << 8 | red) >>> 0;
  function recolor() {
    colors = new Uint32Array(count);
    const key = byId("key");
    if (state.color.startsWith("group:")) {
      const group = columns[state.color], labels = meta.groups[state.color.slice(6)], sums = new Map();
      for (let at = 0; at < count; at++) sums.set(group[at], (sums.get(group[at]) ?? 0) + columns.size[at]);
      const common = [...sums.keys()].filter((at) => at >= 0).sort((a, b) => sums.get(b) - sums.get(a) || a - b).slice(0, GROUPS.length);
      const colorOf = new Map(common.map((at, place) => [at, GROUPS[place]])), rest = [140, 140, 140];
      for (let at = 0; at < count; at++) colors[at] = packed(colorOf.get(group[at]) ?? rest);
      key?.replaceChildren(`Commonest ${state.color.slice(6)} of a cluster:`, ...common.map((at) => dot(colorOf.get(at), labels[at] ?? "no value")),
        ...(sums.size > common.length ? [dot(rest, "others")] : []));
      return;
    }
    const values = column(state.color), log = state.color === "size";
    let low = Infinity, high = -Infinity;
    for (const value of values) if (Number.isFinite(value) && (!log || value > 0)) { low = Math.min(low, value); high = Math.max(high, value); }
    const scale = log ? Math.log : (value) => value, span = scale(high) - scale(low) || 1;
    for (let at = 0; at < count; at++) colors[at] = packed(ramp(Number.isFinite(values[at]) ? (scale(values[at]) - scale(low)) / span : 0));
    const [, name, about] = fields.find(([key]) => key === state.color), gradient = RAMPS[Number(dark.matches)].map((each) => `rgb(${each})`).join(",");
    const bar = make("span", { className: "ramp" });
    bar.style.background = `linear-gradient(90deg, ${gradient})`;
    key?.replaceChildren(make("span", {}, `Colour: ${name}`), make("span", { className: "scale" }, number(low), bar, number(high)), make("span", {}, about));
  }
  const dot = (color, text) => {
    const mark = make("i");
    mark.style.background = `rgb(${color})`;
    return make("span", {}, mark, ` ${text}`);
  };

  // --- charts: dots are painted into a canvas above Bokeh's axes --------------------------------------------------------------

  const stamps = new Map(); // of discs with smooth edges, by radius
  function stamp(radius) {
    const key = Math.round(radius * 4) / 4;
    if (!stamps.has(key)) {
      const reach = Math.ceil(key), side = 2 * reach + 1, cover = new Uint16Array(side * side);
      for (let y = -reach; y <= reach; y++) for (let x = -reach; x <= reach; x++) {
        cover[(y + reach) * side + x + reach] = Math.round(256 * Math.min(Math.max(key + 0.5 - Math.hypot(x, y), 0), 1));
      }
      stamps.set(key, { reach, side, cover });
    }
    return stamps.get(key);
  }

  class Scatter {
    constructor(name, figure, view, box) {
      Object.assign(this, { name, figure, view, box, canvas: make("canvas", { className: "points" }), x: new Float32Array(count), y: new Float32Array(count) });
      [this.columnX, this.columnY, this.log] = meta.scatter[name];
      this.home = [figure.x_range.start, figure.x_range.end, figure.y_range.start, figure.y_range.end];
      box.append(this.canvas);
      setTicks(this);
      const again = () => { this.placed = false; schedule(); };
      for (const range of [figure.x_range, figure.y_range]) range.change.connect(again);
      for (const side of ["inner_width", "inner_height"]) figure.properties[side].change.connect(again);
      figure.on_event("selectiongeometry", (event) => brushed(this, event));
      box.addEventListener("pointermove", (event) => hover(this, event));
      box.addEventListener("pointerleave", () => { byId("tip").hidden = true; });
      box.addEventListener("click", (event) => clicked(this, event));
    }

    layers() { return this.name === "rank" && plans.length ? ["size", "quota"] : [this.columnY]; }

    place() {
      const frame = this.view.frame.bbox, ratio = window.devicePixelRatio || 1;
      const [width, height] = [Math.round(frame.width * ratio), Math.round(frame.height * ratio)];
      if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
      Object.assign(this.canvas.style, { left: `${frame.left}px`, top: `${frame.top}px`, width: `${frame.width}px`, height: `${frame.height}px` });
      const scale = this.log ? Math.log : (value) => value, { x_range: across, y_range: up } = this.figure;
      const axis = (range, length, flip) => {
        const low = scale(range.start), step = length / (scale(range.end) - low);
        const floor = this.log ? range.start : -Infinity; // a log axis has no zero: it is drawn at the edge
        return (value) => { const at = (scale(Math.max(value, floor)) - low) * step; return flip ? length - at : at; };
      };
      const [toX, toY] = [axis(across, width, false), axis(up, height, true)];
      this.points = this.layers().map((name) => {
        const [x, y, of, to] = [new Float32Array(count), new Float32Array(count), column(this.columnX), column(name)];
        for (let at = 0; at < count; at++) { x[at] = toX(of[at]); y[at] = toY(to[at]); }
        return { x, y };
      });
      const most = Math.max(3, Math.min(16, 260 / Math.sqrt(count))) * ratio, top = columns.size.reduce((a, b) => Math.max(a, b), 1);
      this.radii = Float32Array.from(columns.size, (size) => size <= 0 ? 0
        : this.name === "map" ? Math.max(1.2 * ratio, most * Math.sqrt(size / top)) : (count > MANY ? 1.6 : count > 800 ? 2.4 : 3.4) * ratio);
      this.placed = true;
      this.grey = null;
    }

    paint() {
      if (!this.placed) this.place();
      const { width, height } = this.canvas;
      if (!width || !height) return;
      if (!this.image || this.image.width !== width || this.image.height !== height) this.image = new ImageData(width, height);
      const out = this.image.data, ink = dark.matches ? 0xd6ccc3 : 0x60554a;
      if (selected) {
        if (!this.grey) { // all dots in grey, painted once: a brush changes those above them only
          const grey = dark.matches ? 0x6b635a : 0xb9b2aa;
          out.fill(0);
          this.points.forEach((points, layer) => this.dots(points, layer, null, () => grey, 70));
          this.grey = out.slice();
        }
        out.set(this.grey);
      } else out.fill(0);
      this.points.forEach((points, layer) => this.dots(points, layer, selected, layer ? () => ink : (at) => colors[at], count > MANY ? 255 : 205));
      this.canvas.getContext("2d").putImageData(this.image, 0, 0);
    }

    dots({ x, y }, layer, mask, colorOf, strength) {
      const { width, height } = this.canvas, out = this.image.data, words = new Uint32Array(out.buffer), solid = (strength << 24) >>> 0;
      for (let at = 0; at < count; at++) {
        const radius = layer ? this.radii[at] * 0.7 : this.radii[at];
        if (!radius || (mask && !mask[at]) || x[at] < -radius || y[at] < -radius || x[at] > width + radius || y[at] > height + radius) continue;
        const color = colorOf(at);
        if (count > MANY && radius < 2.5) { // too many and too small for smooth edges: a square
          const reach = radius < 1 ? 0 : 1, [left, top] = [Math.round(x[at]), Math.round(y[at])], word = (color | solid) >>> 0;
          for (let row = Math.max(0, top - reach); row <= top + reach && row < height; row++) {
            for (let col = Math.max(0, left - reach); col <= left + reach && col < width; col++) words[row * width + col] = word;
          }
          continue;
        }
        const { reach, side, cover } = stamp(radius), [left, top] = [Math.round(x[at]) - reach, Math.round(y[at]) - reach];
        const [red, green, blue] = [color & 255, color >> 8 & 255, color >> 16 & 255];
        for (let row = Math.max(0, -top); row < side && top + row < height; row++) {
          for (let col = Math.max(0, -left); col < side && left + col < width; col++) {
            const add = cover[row * side + col] * strength >> 8;
            if (!add) continue;
            const to = 4 * ((top + row) * width + left + col), had = out[to + 3], keep = had * (255 - add) / 255, sum = keep + add;
            out[to] = (out[to] * keep + red * add) / sum;
            out[to + 1] = (out[to + 1] * keep + green * add) / sum;
            out[to + 2] = (out[to + 2] * keep + blue * add) / sum;
            out[to + 3] = sum;
          }
        }
      }
    }

    near(event) {
      const box = this.canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
      const [left, top] = [(event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio];
      let best = -1, least = (14 * ratio) ** 2;
      for (const { x, y } of this.points ?? []) for (let at = 0; at < count; at++) {
        const far = (x[at] - left) ** 2 + (y[at] - top) ** 2;
        if (far < least && this.radii[at]) { best = at; least = far; }
      }
      return best;
    }
  }

  function logTicks(low, high) {
    for (const digits of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 7]]) {
      const ticks = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) ticks.push(...digits.map((digit) => digit * 10 ** power));
      const inside = ticks.filter((tick) => tick >= low && tick <= high);
      if (inside.length > 2) return inside;
    }
    return [low, Math.sqrt(low * high), high].map((tick) => Number(tick.toPrecision(3)));
  }
  function setTicks({ figure, log }) {
    if (log) for (const [range, [axis]] of [[figure.x_range, figure.below], [figure.y_range, figure.left]]) axis.ticker.ticks = logTicks(range.start, range.end);
  }

  const scatters = [];
  let figures = {};
  let waitingFrame = false;
  function schedule() {
    if (waitingFrame) return;
    waitingFrame = true;
    requestAnimationFrame(() => {
      waitingFrame = false;
      for (const scatter of scatters) scatter.paint();
      window.tailwisePaints = (window.tailwisePaints ?? 0) + 1;
    });
  }
  let later = 0;
  function brushed(scatter, event) {
    const { x0, x1, y0, y1 } = event.geometry;
    if ([x0, x1, y0, y1].some((value) => typeof value !== "number")) return;
    const sides = [Math.min(x0, x1), Math.max(x0, x1), Math.min(y0, y1), Math.max(y0, y1)].map((value) => Number(value.toPrecision(6)));
    Object.assign(state, { brush: [scatter.name, ...sides].join(","), cluster: "" });
    select();
    schedule();
    showCount();
    clearTimeout(later);
    later = setTimeout(() => { writeHash(); showGallery(); }, event.final ? 0 : 150);
    byId("tip").hidden = true;
  }
  function clicked(scatter, event) {
    if (scatter.dragged) { scatter.dragged = false; return; }
    const cluster = scatter.near(event);
    if (cluster >= 0) pick(cluster);
  }
  function pick(cluster) {
    Object.assign(state, { cluster: String(cluster), brush: "", q: "" });
    refresh();
    byId("gallery")?.scrollIntoView({ block: "start" });
  }
  let hovered = -1;
  async function hover(scatter, event) {
    const tip = byId("tip"), cluster = event.buttons ? -1 : scatter.near(event);
    if (cluster < 0) { tip.hidden = true; hovered = -1; return; }
    tip.hidden = false;
    const place = () => {
      tip.style.left = `${Math.max(Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 10), 4)}px`;
      tip.style.top = `${event.clientY + 24 + tip.offsetHeight < innerHeight ? event.clientY + 14 : Math.max(event.clientY - tip.offsetHeight - 14, 4)}px`;
    };
    if (cluster === hovered) { place(); return; }
    hovered = cluster;
    const lines = [make("b", {}, nameOf(cluster)), make("div", {}, factsOf(cluster).join(" · ")), make("div", { className: "soft" }, meta.words[cluster])];
    tip.replaceChildren(...lines);
    place();
    const { clusters, samples } = await load(chunkOf(cluster));
    if (hovered !== cluster) return;
    const rows = [...new Set((clusters[cluster] ?? []).map(([, row]) => row))].filter((row) => samples[row].image.startsWith("data:"));
    tip.replaceChildren(...lines, ...rows.slice(0, 4).map((row) => make("img", { src: samples[row].image, alt: "" })));
    place();
  }
  function theme() {
    const [text, line] = dark.matches ? ["#c3ccd6", "#3a444f"] : ["#4a5560", "#e3e7ec"], font = getComputedStyle(document.body).fontFamily;
    for (const figure of Object.values(figures)) {
      for (const axis of [...figure.below, ...figure.left]) {
        if ("major_label_text_color" in axis) Object.assign(axis, { major_label_text_color: text, axis_label_text_color: text, axis_line_color: line, major_tick_line_color: line, minor_tick_line_color: null, axis_label_text_font_style: "normal", axis_label_text_font: font, major_label_text_font: font, axis_label_text_font_size: "12px" });
      }
      for (const item of figure.center) {
        if ("grid_line_color" in item) item.grid_line_color = line;
      }
    }
    for (const scatter of scatters) scatter.grey = null;
    recolor();
    schedule();
  }
  async function drawCharts() {
    const boxes = Object.fromEntries([...document.querySelectorAll(".plot")].map((box) => [box.dataset.chart, box]));
    const ids = meta.charts;
    if (!Object.keys(ids).length) return;
    const roots = Object.fromEntries(Object.entries(ids).map(([name, id]) => [id, boxes[name]]));
    const documents = { report: JSON.parse(byId("data-charts").textContent) };
    const views = await Bokeh.embed.embed_items(documents, [{ docid: "report", roots, root_ids: Object.keys(roots) }]);
    const manager = views[0], touch = matchMedia("(pointer: coarse)").matches;
    for (const [name, id] of Object.entries(ids)) {
      const view = manager.get_by_id ? manager.get_by_id(id) : [...manager.roots].find((each) => each.model.id === id);
      figures[name] = view.model;
      if (touch) view.model.toolbar.active_drag = null; // a finger scrolls the page; a tap selects
      if (meta.scatter[name]) scatters.push(new Scatter(name, view.model, view, boxes[name]));
      boxes[name].addEventListener("pointerdown", (down) => {
        const scatter = scatters.find((each) => each.name === name);
        boxes[name].addEventListener("pointerup", (up) => {
          if (scatter) scatter.dragged = Math.hypot(up.clientX - down.clientX, up.clientY - down.clientY) > 4;
        }, { once: true });
      });
    }
    theme();
  }
  function zoom(home) {
    for (const scatter of scatters) {
      let [left, right, low, high] = scatter.home;
      if (!home) {
        const [x, y] = [column(scatter.columnX), column(scatter.columnY)];
        const bounds = (values, log, [start, end]) => {
          let [least, most] = [Infinity, -Infinity];
          for (let at = 0; at < count; at++) if (selected?.[at] && columns.size[at] && Number.isFinite(values[at]) && (!log || values[at] > 0)) {
            least = Math.min(least, values[at]); most = Math.max(most, values[at]);
          }
          if (least > most) return [start, end];
          return log ? [least / 1.3, most * 1.3] : [least - 0.08 * (most - least || 1), most + 0.08 * (most - least || 1)];
        };
        [left, right] = bounds(x, scatter.log, [left, right]);
        [low, high] = bounds(y, scatter.log, [low, high]);
      }
      scatter.figure.x_range.setv({ start: left, end: right });
      scatter.figure.y_range.setv({ start: low, end: high });
      setTicks(scatter);
    }
    byId("unzoom").hidden = home;
  }

  // --- gallery ----------------------------------------------------------------------------------------------------------

  const KINDS = ["nearest to the centroid, with similarity", "farthest from the centroid, with similarity", "drawn once in epoch 0", "not drawn in epoch 0", "drawn more than once in epoch 0"];
  const chunkOf = (cluster) => `chunk-${Math.floor((columns.rank[cluster] - 1) / meta.chunk)}`;
  function factsOf(cluster) {
    const facts = [`${columns.size[cluster].toLocaleString("en")} samples`];
    if (plans.length) facts.push(`${number(column("quota")[cluster])} in an epoch (rate ${number(column("rate")[cluster])})`);
    if (columns.complexity) facts.push(`complexity ${number(columns.complexity[cluster])}`, `spread ${number(columns.d_intra[cluster])}`);
    for (const name of Object.keys(meta.groups)) {
      const group = columns[`group:${name}`][cluster];
      if (group >= 0) facts.push(`${name}: ${meta.groups[name][group] ?? "no value"} (${Math.round(100 * columns[`share:${name}`][cluster])} %)`);
    }
    return facts;
  }
  function thumb(sample, row, note = "", kept = false) {
    const picture = sample.image.startsWith("data:") ? make("img", { src: sample.image, alt: "", loading: "lazy" }) : make("span", { className: "none" }, sample.image);
    const short = [...sample.caption].length > 60 ? `${[...sample.caption].slice(0, 59).join("")}…` : sample.caption;
    return make("button", { type: "button", className: kept ? "thumb kept" : "thumb", "aria-label": `Sample ${sample.key}: ${short}`, "data-row": row, onclick: () => { state.sample = String(row); writeHash(); showSample(sample); } },
      picture, make("span", { className: "caption" }, short), note ? make("span", { className: "note" }, note) : null);
  }
  let order = [];
  let shown = 0;
  function showGallery() {
    if (!byId("gallery")) return;
    const values = column(state.sort), sign = state.up ? 1 : -1;
    order = [...Array(count).keys()].filter((at) => columns.size[at] > 0 && (!selected || selected[at]));
    order.sort((a, b) => sign * ((Number.isFinite(values[a]) ? values[a] : -Infinity) - (Number.isFinite(values[b]) ? values[b] : -Infinity)) || a - b);
    shown = 0;
    byId("cards").replaceChildren();
    showMore();
  }
  function showMore() {
    const next = order.slice(shown, shown + STEP);
    shown += next.length;
    for (const cluster of next) {
      const card = make("article", { className: "card", "data-cluster": cluster, "aria-label": nameOf(cluster) },
        make("h3", {}, nameOf(cluster)), make("p", { className: "words" }, meta.words[cluster]),
        make("ul", { className: "chips" }, ...factsOf(cluster).map((fact) => make("li", {}, fact))));
      byId("cards").append(card);
      fill(card, cluster);
    }
    byId("more").hidden = shown >= order.length;
    byId("more").textContent = `Show more of ${order.length.toLocaleString("en")} clusters`;
    if (!order.length) byId("cards").append(make("p", {}, "No cluster matches. Clear the selection, or search for other words."));
  }
  async function fill(card, cluster) {
    const { clusters, samples } = await load(chunkOf(cluster));
    const mine = clusters[cluster] ?? [], plan = planNumber(state.plan), strips = [];
    const kinds = KINDS.map((_, kind) => mine.filter(([of]) => of === (kind < 2 ? kind : kind + 3 * plan)));
    kinds.forEach((found, kind) => {
      if (found.length) strips.push(make("div", { className: "strip" }, make("h4", {}, KINDS[kind]), make("div", { className: "thumbs" },
        ...found.map(([, row]) => thumb(samples[row], row, kind < 2 ? fixed(samples[row].similarity, 3) : "")))));
    });
    if (!strips.length) strips.push(make("p", { className: "soft" }, "No pictures: see the option --most-images."));
    card.append(make("div", { className: "strips" }, ...strips));
  }
  function epochs(counts) {
    return make("span", { className: "epochs", role: "img", "aria-label": `copies in epochs 0 to ${counts.length - 1}: ${counts.join(", ")}` },
      ...counts.map((copies) => make("i", { className: copies ? "on" : "" }, copies > 1 ? String(copies) : "")));
  }
  function showSample(sample) {
    const dialog = byId("sample"), list = make("dl"), say = (term, ...value) => list.append(make("dt", {}, term), make("dd", {}, ...value));
    say("shard", meta.shards[sample.shard] ?? String(sample.shard));
    say("uid", sample.uid);
    if (sample.cluster >= 0) say("cluster", make("button", { type: "button", className: "link", onclick: () => { dialog.close(); pick(sample.cluster); } }, nameOf(sample.cluster)), sample.similarity === undefined ? "" : `, similarity to its centroid ${number(sample.similarity)}`);
    else if (meta.clustering) say("cluster", `none in ${meta.clustering}`);
    for (const [name, reason] of sample.dropped ?? []) say("dropped", `by ${name}: ${reason}`);
    plans.forEach((plan, at) => {
      const found = sample.plans?.[at];
      if (!found) return say(`plan ${plan.name}`, "imported after this plan was made");
      const first = found[1].findIndex((copies) => copies > 0);
      say(`plan ${plan.name}`, epochs(found[1]), ` ${first < 0 ? `not in the first ${found[1].length} epochs` : `first in epoch ${first}`}; rate ${number(found[0])}`);
    });
    dialog.replaceChildren(make("h2", { id: "sample-title" }, `Sample ${sample.key}`), make("div", { className: "pair" },
      sample.image.startsWith("data:") ? make("img", { className: "large", src: sample.image, alt: "the sample's image" }) : make("p", {}, sample.image),
      make("p", {}, sample.caption)), list, make("p", { className: "soft" }, "All that is known: ", make("code", {}, `tailwise why ${meta.catalog} ${sample.uid}`)),
      make("button", { type: "button", onclick: () => dialog.close() }, "Close"));
    if (!dialog.open) dialog.showModal();
  }
  async function openSample() {
    if (!Object.hasOwn(meta.places, state.sample) || byId("sample").open) return;
    const { samples } = await load(meta.places[state.sample]);
    showSample(samples[state.sample]);
  }

  // --- duplicates, filters, two plans -----------------------------------------------------------------------------------------

  async function showLists() {
    if (!byId("groups") && !byId("dropped")) return;
    const { groups, filtered, samples } = await load("lists");
    const lists = new Set(groups.map((group) => group.list)).size;
    let done = 0;
    const more = () => {
      const next = groups.slice(done, done + 2 * STEP);
      done += next.length;
      byId("groups").append(...next.map((group) => make("article", { className: "card", "aria-label": `duplicates of ${samples[group.kept].key}` },
        make("h3", {}, `${group.rows.length + group.more} ${group.rows.length + group.more === 1 ? "duplicate" : "duplicates"}${lists > 1 ? ` (${group.list})` : ""}`), make("div", { className: "thumbs" }, thumb(samples[group.kept], group.kept, "kept", true),
          ...group.rows.map((row, at) => thumb(samples[row], row, fixed(group.near[at], 3)))), group.more ? make("p", { className: "soft" }, `and ${group.more} more`) : null)));
      byId("more-groups").hidden = done >= groups.length;
    };
    if (byId("groups")) { byId("more-groups").addEventListener("click", more); more(); }
    byId("dropped")?.replaceChildren(...Object.entries(filtered).map(([title, items]) => make("div", { className: "card" }, make("h3", {}, title),
      make("div", { className: "thumbs" }, ...items.map(([row, value]) => thumb(samples[row], row, number(value, 4)))))));
  }
  function showTwo() {
    if (!byId("two-plans")) return;
    const [first, second] = [columns[`quota:${planNumber(state.plan)}`], columns[`quota:${planNumber(state.versus)}`]];
    const change = Float64Array.from(first, (value, at) => second[at] - value);
    const ranked = [...Array(count).keys()].filter((at) => columns.size[at] > 0).sort((a, b) => change[b] - change[a] || a - b);
    const moved = (sign) => {
      const found = change.filter((value) => sign * value > 1e-6);
      return `${found.length.toLocaleString("en")} clusters ${sign > 0 ? "gain" : "lose"} ${number(Math.abs(found.reduce((sum, value) => sum + value, 0)))} samples an epoch`;
    };
    byId("two-about").textContent = state.plan === state.versus ? "Choose another plan under “against”."
      : `From ${state.plan} to ${state.versus}, ${moved(1)} and ${moved(-1)}.`;
    const most = Math.max(first.reduce((a, b) => Math.max(a, b), 0), second.reduce((a, b) => Math.max(a, b), 0));
    const rows = (title, clusters) => [make("caption", {}, title), make("thead", {}, make("tr", {}, ...["cluster", "size", state.plan, state.versus, "change"].map((head) => make("th", { scope: "col" }, head)))),
      make("tbody", {}, ...clusters.map((at) => make("tr", {}, make("td", {}, make("button", { type: "button", className: "link", onclick: () => pick(at) }, nameOf(at)), " ", make("span", { className: "soft" }, meta.words[at].split(" ").slice(0, 3).join(" "))),
        ...[columns.size[at], first[at], second[at], change[at]].map((value, nth) => make("td", {}, fixed(value, nth && most < 1000 ? 1 : 0))))))];
    byId("gains").replaceChildren(...rows("Clusters that gain most", ranked.slice(0, 12).filter((at) => change[at] > 0)));
    byId("losses").replaceChildren(...rows("Clusters that lose most", ranked.slice(-12).reverse().filter((at) => change[at] < 0)));
  }

  // --- controls ----------------------------------------------------------------------------------------------------------

  function showCount() {
    const all = columns.size.reduce((sum, size) => sum + (size > 0), 0);
    let found = 0, samples = 0;
    for (let at = 0; at < count; at++) if (columns.size[at] > 0 && (!selected || selected[at])) { found++; samples += columns.size[at]; }
    byId("count").textContent = `${selected ? `${found.toLocaleString("en")} of ` : ""}${all.toLocaleString("en")} clusters, ${samples.toLocaleString("en")} samples`;
    for (const id of ["clear", "zoom"]) byId(id).hidden = !selected;
  }
  function showControls() {
    for (const id of ["plan", "versus", "color", "sort"]) if (byId(id)) byId(id).value = state[id];
    if (byId("search").value !== state.q) byId("search").value = state.q;
    if (byId("direction")) byId("direction").textContent = state.up ? "↑ smallest first" : "↓ largest first";
  }
  function refresh() {
    showControls();
    select();
    recolor();
    for (const scatter of scatters) scatter.placed = false;
    for (const figure of Object.values(figures)) for (const renderer of figure.renderers) {
      if (renderer.name) renderer.visible = renderer.name === `plan${planNumber(state.plan)}`;
    }
    for (const item of document.querySelectorAll(".legend [data-plan]")) item.hidden = Number(item.dataset.plan) !== planNumber(state.plan);
    if (figures.versus) {
      figures.versus.below[0].axis_label = `rate in ${state.plan}`;
      figures.versus.left[0].axis_label = `rate in ${state.versus}`;
    }
    schedule();
    showCount();
    showTwo();
    showGallery();
    writeHash();
  }
  function listen() {
    const options = (id, pairs) => byId(id)?.replaceChildren(...pairs.map(([value, text]) => make("option", { value }, text)));
    options("sort", fields);
    options("color", [...fields, ...Object.keys(meta.groups).map((name) => [`group:${name}`, name])]);
    for (const id of ["plan", "versus", "color", "sort"]) byId(id)?.addEventListener("change", () => { state[id] = byId(id).value; refresh(); });
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
    byId("search").addEventListener("input", () => { state.q = byId("search").value.trim(); clearTimeout(later); later = setTimeout(refresh, 120); });
    byId("direction")?.addEventListener("click", () => { state.up = state.up ? "" : "1"; refresh(); });
    byId("more")?.addEventListener("click", showMore);
    byId("clear").addEventListener("click", () => { Object.assign(state, { brush: "", cluster: "", q: "" }); refresh(); });
    byId("zoom").addEventListener("click", () => zoom(false));
    byId("unzoom").addEventListener("click", () => zoom(true));
    window.addEventListener("hashchange", () => { if (location.hash.includes("=") || !location.hash) { readHash(); refresh(); openSample(); } });
    dark.addEventListener("change", theme);
  }
  async function begin() {
    readHash();
    byId("sample").addEventListener("close", () => { state.sample = ""; writeHash(); });
    if (byId("controls")) listen();
    const lists = showLists();
    if (count && byId("controls")) refresh();
    await drawCharts();
    if (count && byId("controls")) refresh();
    await openSample();
    await lists;
    performance.mark("tailwise-interactive");
    document.documentElement.dataset.ready = "true";
  }
  begin();
})();
