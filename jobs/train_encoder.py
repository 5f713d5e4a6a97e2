"""Trains a fresh text encoder on the catalogue's own text."""

import torch

from gr.count import count_parameters
from gr.data.split import Split
from gr.sid.encoder import TextViews, contrastive_loss, fresh_encoder
from gr.text import item_texts, train_tokenizer
from jobs.runtime import Context, main
from jobs.sid_config import TrainEncoderConfig
from jobs.trainer import Micro, accelerator_for, train

VALIDATION_BATCH = 10**9  # a step no training reaches: its views are those of validation


def body(context: Context[TrainEncoderConfig]) -> None:
    config, optimizer = context.config, context.config.optimizer
    accelerator = accelerator_for(context, optimizer)
    texts = item_texts(Split(context.input("split")).items())
    tokenizer = train_tokenizer(texts, config.vocab)
    torch.manual_seed(config.seed)
    size = config.size
    model = fresh_encoder(len(tokenizer), size.layers, size.d_model, size.heads, size.d_ff, config.max_tokens)
    total, non_embedding = count_parameters(model)
    views = TextViews(tokenizer, texts, config.max_tokens, config.seed)

    def batches(step: int, _accumulation: int) -> list[Micro]:
        tokens, mask = views.batch(step, optimizer.global_batch)
        count = int(mask.sum())
        return [Micro({"input_ids": tokens, "attention_mask": mask}, len(tokens) / 2, count, 6.0 * non_embedding * count)]

    def validate(module: torch.nn.Module) -> float:
        tokens, mask = views.batch(VALIDATION_BATCH, optimizer.global_batch)
        inputs = {"input_ids": tokens.to(accelerator.device), "attention_mask": mask.to(accelerator.device)}
        return contrastive_loss(module, inputs).item() / (len(tokens) / 2)

    context.facts.update(n_llm=total, n_non_embedding=non_embedding, init="fresh")
    model = train(context, accelerator, model, optimizer, config.seed, batches, contrastive_loss, validate)
    if context.is_main:
        model.save_pretrained(context.out)
        tokenizer.model_max_length = config.max_tokens
        tokenizer.save_pretrained(context.out)


if __name__ == "__main__":
    main("train_encoder", body)
