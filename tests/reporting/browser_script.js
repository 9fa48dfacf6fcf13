// Runs the script of a page without a browser: a document of plain objects, then the filters.
//   node browser_script.js <script file> <file with the JSON data>
"use strict";
const fs = require("fs");

class FakeNode {
  constructor(tag) { Object.assign(this, { tag, children: [], style: {}, handlers: {}, value: "", checked: false, own: "" }); }
  append(...nodes) { this.children.push(...nodes); }
  replaceChildren(...nodes) { this.children = nodes; }
  addEventListener(event, handler) { this.handlers[event] = handler; }
  get textContent() { return this.own + this.children.map((c) => (typeof c === "string" ? c : c.textContent)).join(""); }
  set textContent(text) { this.own = text; this.children = []; }
}

const nodes = {};
global.document = {
  createElement: (tag) => new FakeNode(tag),
  getElementById: (id) => (nodes[id] ??= new FakeNode("div")),
};
global.location = { search: "" };
document.getElementById("data").textContent = fs.readFileSync(process.argv[3], "utf-8");
eval(fs.readFileSync(process.argv[2], "utf-8"));

const shown = () => nodes.documents.children.map((box) => box.children[0].children[0].textContent);
function set(id, event, change) {
  Object.assign(nodes[id], change);
  nodes[id].handlers[event]();
  return shown();
}
const tags = new Set();
function visit(node) {
  if (typeof node === "string") return;
  tags.add(node.tag);
  node.children.forEach(visit);
}
const found = { reading: shown() };
for (const order of ["gain", "ess", "change"]) found[order] = set("order", "change", { value: order });
set("order", "change", { value: "reading" });
found.invalid = set("invalid", "change", { checked: true });
found.invalidCount = nodes.count.textContent;
set("invalid", "change", { checked: false });
found.search = set("search", "input", { value: "CHANGED d2" });
found.nothing = set("search", "input", { value: "nowhere" });
set("search", "input", { value: "" });
const box = nodes.documents.children[0];
box.open = true;
box.handlers.toggle();
visit(box);
found.text = box.textContent;
found.tags = [...tags].sort();
document.getElementById("doc").value = "a b&c";
nodes.go.handlers.click();
found.opened = location.search;
console.log(JSON.stringify(found));
