-- Counts and rates of the retrieved features as of each row's time, and exit 0's features that are made of them.
--
-- Runs unchanged on DuckDB and Spark SQL. It reads `interactions`: row_id, user_id, item_id, timestamp (seconds, also
-- fractions), label (0 or 1), split, role, and sampled (true for a sampled negative, which is no answer). Only strictly
-- earlier rows are read: those of one second do not see each other. For logs cut by time, where rows read all of them.

with train as (  -- the share of likes to which rates of few rows shrink
    select avg(label) as base from interactions where split = 'train' and role = 'target'
),
numbered as (  -- an item's and a user's seconds, numbered, so that 1 preceding is the second before, however long ago
    select
        row_id, user_id, item_id,
        case when sampled then null else label end as answer,
        dense_rank() over (partition by item_id order by timestamp) as item_second,
        dense_rank() over (partition by user_id order by timestamp) as user_second
    from interactions
),
counted as (
    select
        row_id,
        count(answer) over of_item as item_count, coalesce(sum(answer) over of_item, 0) as item_likes,
        count(answer) over of_user as user_count, coalesce(sum(answer) over of_user, 0) as user_likes
    from numbered
    window
        of_item as (partition by item_id order by item_second range between unbounded preceding and 1 preceding),
        of_user as (partition by user_id order by user_second range between unbounded preceding and 1 preceding)
)
select
    row_id,
    item_likes / nullif(item_count, 0) as item_rate, item_count,
    user_likes / nullif(user_count, 0) as user_rate, user_count,
    -- log-odds of (likes + 5 base) / (rows + 5), as project.features has them, and log(1 + rows)
    ln(item_likes + 5 * base) - ln(item_count - item_likes + 5 * (1 - base)) as item_log_odds,
    ln(1 + item_count) as item_rows,
    ln(user_likes + 5 * base) - ln(user_count - user_likes + 5 * (1 - base)) as user_log_odds,
    ln(1 + user_count) as user_rows
from counted cross join train
order by row_id
