// Calls the server at the given URL with Ollama's own client for Node.js, and prints the answers.
// Run as: node ollama_calls.mjs FOLDER_WITH_NODE_MODULES URL JSON_OF_TOOLS
import { pathToFileURL } from "node:url";

const [folder, host, tools] = process.argv.slice(2);
const { Ollama } = await import(pathToFileURL(`${folder}/node_modules/ollama/dist/index.mjs`));
const client = new Ollama({ host });
const asked = {
  model: "tiny:latest",
  messages: [{ role: "user", content: "Hello" }],
  options: { temperature: 0, num_predict: 12 },
};
const parts = [];
for await (const part of await client.chat({ ...asked, stream: true })) parts.push(part);
const calls = { ...asked, model: "caller", tools: JSON.parse(tools), options: { num_predict: 2000 } };
const problem = await client.chat({ ...asked, model: "none" }).catch((error) => error);
console.log(
  JSON.stringify({
    whole: await client.chat(asked),
    parts,
    generated: await client.generate({ model: "tiny", prompt: "Hello", options: asked.options }),
    called: await client.chat(calls),
    names: (await client.list()).models.map((model) => model.name),
    shown: await client.show({ model: "tiny" }),
    problem: { status: problem.status_code, message: problem.message },
  }),
);
