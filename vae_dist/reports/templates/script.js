"use strict";
document.documentElement.classList.add("live");
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// The pointer's position in an SVG's area, from 0 to 1 rightwards and downwards.
const place = (event, svg) => {
  const area = svg.querySelector(".frame").getBoundingClientRect();
  return [(event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height];
};

// Charts: all charts of a group show the reading of the same step.
const readers = new Map();
for (const chart of document.querySelectorAll(".chart")) {
  const svg = chart.querySelector(":scope > svg"), cursor = svg.querySelector(".cursor");
  const reading = chart.querySelector(".reading");
  const at = chart.dataset.at.split(" ").map(Number), says = chart.dataset.says.split("\n");
  const first = Number(chart.dataset.shown);
  let now = first;
  const show = (index) => {
    now = index;
    cursor.setAttribute("x1", `${at[index]}%`);
    cursor.setAttribute("x2", `${at[index]}%`);
    cursor.style.visibility = "visible";
    reading.textContent = says[index];
    svg.setAttribute("aria-valuenow", index);
    svg.setAttribute("aria-valuetext", says[index]);
  };
  const rest = () => { show(first); cursor.style.visibility = "hidden"; };
  const seek = (percent) => {
    const distances = at.map((x) => Math.abs(x - percent));
    show(distances.indexOf(Math.min(...distances)));
  };
  readers.set(chart.parentElement, [...readers.get(chart.parentElement) ?? [], { seek, rest }]);
  const all = (act) => readers.get(chart.parentElement).forEach(act);
  svg.tabIndex = 0;
  svg.setAttribute("role", "slider");
  svg.setAttribute("aria-valuemin", 0);
  svg.setAttribute("aria-valuemax", at.length - 1);
  rest();
  const read = (event) => { const [x] = place(event, svg); all((one) => one.seek(x * 100)); };
  svg.addEventListener("pointermove", read);
  svg.addEventListener("pointerdown", read);
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") all((one) => one.rest()); });
  svg.addEventListener("blur", () => all((one) => one.rest()));
  svg.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: at.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    all((one) => one.seek(at[clamp(to, 0, at.length - 1)]));
  });
}

// Pictures: the slider shows those of one step.
for (const slider of document.querySelectorAll("input[type=range]")) {
  const steps = slider.dataset.steps.split(" "), output = slider.parentElement.querySelector("output");
  slider.addEventListener("input", () => {
    const step = steps[slider.value];
    output.textContent = Number(step).toLocaleString("en");
    slider.setAttribute("aria-valuetext", `step ${step}`);
    for (const image of document.querySelectorAll("[data-step]")) image.hidden = image.dataset.step !== step;
  });
  slider.value = steps.length - 1;
}

// The plane: the view shows the cell of the picture that the marker is on.
for (const plane of document.querySelectorAll(".plane")) {
  const { columns, rows, extent, cell, names } = plane.dataset, [width, height] = cell.split(" ").map(Number);
  const view = plane.parentElement.querySelector(".view"), code = plane.parentElement.querySelector(".code");
  const marker = plane.querySelector(".marker");
  const middle = [(columns - 1) / 2, (rows - 1) / 2];
  let [column, row] = middle;
  const move = (toColumn, toRow) => {
    [column, row] = [clamp(toColumn, 0, columns - 1), clamp(toRow, 0, rows - 1)];
    marker.setAttribute("x", `${column / columns * 100}%`);
    marker.setAttribute("y", `${row / rows * 100}%`);
    view.setAttribute("viewBox", `${column * width} ${row * height} ${width} ${height}`);
    const values = [column - middle[0], middle[1] - row].map((cells) => (cells / middle[0] * extent).toFixed(2));
    const said = names.split(",").map((name, axis) => `${name} = ${values[axis].replace("-", "\u2212")}`);
    code.textContent = said.join("\n");
  };
  const follow = (event) => {
    const [x, y] = place(event, plane);
    move(Math.floor(x * columns), Math.floor(y * rows));
  };
  plane.tabIndex = 0;
  plane.setAttribute("role", "application");
  plane.addEventListener("pointermove", follow);
  plane.addEventListener("pointerdown", follow);
  plane.addEventListener("keydown", (event) => {
    const far = event.shiftKey ? 5 : 1;
    const to = {
      ArrowLeft: [column - far, row], ArrowRight: [column + far, row],
      ArrowUp: [column, row - far], ArrowDown: [column, row + far], Home: middle,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    move(...to);
  });
}
