// What the proof asks the page: the greedy reply to a message, as ids and log-probabilities, and why it ended.
async ([content, count]) => {
    const { readModel, streamReply } = await import("./page/server.js");
    await readModel();
    const messages = [{ role: "user", content }];
    const asked = { messages, max_tokens: count, temperature: 0, logprobs: true, top_logprobs: 1 };
    const tokens = [];
    let finish = null;
    try {
        for await (const { chunk } of streamReply(asked)) {
            tokens.push(...(chunk.choices[0]?.logprobs?.content ?? []).map(({ id, logprob }) => [id, logprob]));
            finish = chunk.choices[0]?.finish_reason ?? finish;
        }
    } catch (error) {
        if (!error.title) throw error;
        finish = `${error.title} ${error.advice}`;
    }
    return [tokens, finish];
}
